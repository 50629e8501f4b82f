"""Bulk embedding on a real Ray cluster, which takes long to start: `make soak` runs this."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("ray", reason="pip install 'fullrank-server[ray]'")

from scale import bulk, ray_bulk, sources
from tests.support.encoders import write_encoder
from tests.support.images import encoded, pictures
from tests.support.ray_cluster import PATIENCE, ROOT, cluster, environment, named, wait_for
from tests.support.s3 import contents, s3_server
from tools.stack import free_port

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "alpha"
    write_encoder(folder, 2)
    return folder


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """Images that take long to decode, and a place for rows."""
    with s3_server() as system:
        for bucket in ("data", "rows"):
            system.mkdir(bucket)
        for index in range(48):
            system.pipe_file(f"data/photos/{index:02d}.png", encoded(Image.new("L", (3900, 3900), index)))
        system.pipe_file("data/photos/bad.png", b"no image")
        yield system


@pytest.fixture(scope="module")
def ray_cluster(store: Any) -> Iterator[tuple[str, Path]]:
    """A cluster whose workers find the store by the environment."""
    with cluster(cpus=2) as found:
        yield found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, picture in enumerate(pictures(120, 1)):
        (folder / f"{index:03d}.png").write_bytes(encoded(picture))
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def embed(*arguments: str, folder: Path, shard: int = 8) -> subprocess.Popen[str]:
    """`fullrank embed` in a process of its own, with small shards."""
    program = f"from scale import sources; sources.FILES_A_SHARD = {shard}; from cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "embed", *arguments],
        cwd=ROOT,
        env=environment(folder, COLUMNS="200"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_cluster_writes_the_bytes_of_a_local_run_even_if_its_workers_are_killed(
    ray_cluster: tuple[str, Path], encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = ray_cluster
    monkeypatch.setattr(sources, "FILES_A_SHARD", 8)
    local = tmp_path / "local"
    bulk.run_local(bulk.begin(local, encoder, sources.shards(str(images))), encoder, local)
    out = tmp_path / "out"
    arguments = [str(images), "--encoder", str(encoder), "--out", str(out), "--ray", address]
    run = embed(*arguments, "--processes", "2", folder=folder)
    wait_for(lambda: run.poll() is not None or len(list(out.glob("*.parquet"))) >= 3)
    for worker in named(folder, "ray::Embedder"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    printed, complaints = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, complaints
    assert "121" in printed
    assert files(out) == files(local)
    # What is complete is skipped; what is missing is done again.
    victim = next(out.glob("*.parquet"))
    victim.unlink()
    again = embed(*arguments, folder=folder)
    _, complaints = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, complaints
    assert complaints.count("images, shard") + complaints.count("bad, shard") == 1
    assert files(out) == files(local)


def test_an_address_that_does_not_answer_ends_with_a_remedy(encoder: Path, images: Path, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            arguments = [str(images), "--encoder", str(encoder), "--out", str(tmp_path / "out")]
            run = embed(*arguments, "--ray", address, folder=tmp_path)
            _, complaints = run.communicate(timeout=PATIENCE)
            assert run.returncode == 1
            assert f"no Ray cluster at {address}" in complaints
            assert "ray start --head" in complaints


@pytest.mark.parametrize("address", ["nowhere", "host:", "host:port", "ray://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(bulk.BulkError, match="expected HOST:PORT"), ray_bulk.connected(address):
        pass


def test_a_cluster_reads_from_a_store_writes_to_it_and_goes_on_after_a_kill(
    ray_cluster: tuple[str, Path], store: Any, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = ray_cluster
    out = "s3://rows/of-ray"
    arguments = ["s3://data/photos", "--encoder", str(encoder), "--out", out, "--ray", address]

    def complete() -> set[str]:
        return {it for it in contents(store, out) if it.endswith(".parquet")}

    run = embed(*arguments, "--processes", "1", folder=folder)
    wait_for(lambda: run.poll() is not None or bool(complete()))
    run.kill()
    run.communicate()
    wait_for(lambda: not named(folder, "ray::Embedder"))  # Ray ends the actors of a driver that is gone
    before = complete()
    assert 0 < len(before) < 7
    again = embed(*arguments, folder=folder)
    printed, complaints = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, complaints
    assert complaints.count(", shard ") == 7 - len(before), complaints
    assert not any(f"{it.removesuffix('.parquet')}:" in complaints for it in before)
    assert "49" in printed
    monkeypatch.setattr(sources, "FILES_A_SHARD", 8)
    local = tmp_path / "local"
    bulk.run_local(bulk.begin(local, encoder, sources.shards("s3://data/photos")), encoder, local)
    assert contents(store, out) == contents(store, str(local))
