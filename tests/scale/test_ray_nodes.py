"""A bulk run over two Ray nodes, each in a network namespace of its own, as two machines with a cable between them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install 'fullrank-server[ray]'")

from scale import bulk, sources
from tests.support.encoders import write_encoder
from tests.support.images import encoded, noise
from tests.support.ray_cluster import ROOT, end, environment, named, new_folder, start_node, wait_for

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="network namespaces need iproute2"),
]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 6379  # in a namespace every port is free


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Two network namespaces that reach each other and nothing else. Skips where the kernel forbids them."""
    names = [f"fullrank{os.getpid()}{side}" for side in "ab"]
    cables = [f"fr{os.getpid() % 10**8}{side}" for side in "ab"]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", cables[0], "type", "veth", "peer", "name", cables[1]]]
    for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
        commands += [["link", "set", cable, "netns", name], ["-n", name, "addr", "add", f"{address}/24", "dev", cable]]
        commands += [["-n", name, "link", "set", device, "up"] for device in ("lo", cable)]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"ip {' '.join(command)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_nodes_write_the_bytes_of_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", 8)
    encoder = tmp_path / "alpha"
    write_encoder(encoder, 2)
    images = tmp_path / "images"
    images.mkdir()
    # Large images, so that the work is not done before both nodes have started.
    for index in range(8):
        (images / f"large{index}.png").write_bytes(encoded(noise((1500, 1500), seed=index)))
    for index in range(8, 160):
        (images / f"{index:03d}.png").symlink_to(images / f"large{index % 8}.png")
    local, out = tmp_path / "local", tmp_path / "out"
    bulk.run_local(bulk.begin(local, encoder, sources.shards(str(images))), encoder, local)
    folder = new_folder()
    program = "from scale import sources; sources.FILES_A_SHARD = 8; from cli import main; main()"
    with two_namespaces() as names:
        there = [["ip", "netns", "exec", name] for name in names]
        try:
            head = ["--head", f"--node-ip-address={ADDRESSES[0]}", f"--port={PORT}", f"--temp-dir={folder}/t"]
            start_node(folder, head, there[0], cpus=1)
            worker = [f"--address={ADDRESSES[0]}:{PORT}", f"--node-ip-address={ADDRESSES[1]}"]
            start_node(folder, worker, there[1], cpus=1)
            command = [*there[0], sys.executable, "-c", program, "embed", str(images), "--encoder", str(encoder)]
            command += ["--out", str(out), "--ray", f"{ADDRESSES[0]}:{PORT}"]
            log = (tmp_path / "log").open("w+")
            run = subprocess.Popen(command, cwd=ROOT, env=environment(folder), stdout=log, stderr=log)
            # One CPU a node, so each has one actor. While one is stopped, what appears is the other's work.
            for name in names:
                _does_its_part(folder, name, names, out, run)
            run.wait(600)
            log.seek(0)
            assert run.returncode == 0, log.read()[-3000:]
        finally:
            end(folder)
    assert {it.name: it.read_bytes() for it in out.iterdir()} == {it.name: it.read_bytes() for it in local.iterdir()}


def _does_its_part(folder: Path, name: str, names: list[str], out: Path, run: subprocess.Popen[bytes]) -> None:
    """Stop the other node's actor, see that output goes on, and let the other go on."""
    (other,) = set(names) - {name}
    wait_for(lambda: run.poll() is not None or bool(actors(folder, other) and actors(folder, name)))
    assert run.poll() is None, "the work was done before both nodes had started"
    stopped = actors(folder, other)
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        before = len(list(out.glob("*.parquet")))
        wait_for(lambda: run.poll() is not None or len(list(out.glob("*.parquet"))) > before)
        assert len(list(out.glob("*.parquet"))) > before
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)


def actors(folder: Path, namespace: str) -> set[int]:
    """The processes that embed in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout
    return set(map(int, found.split())) & set(named(folder, "ray::Embedder"))
