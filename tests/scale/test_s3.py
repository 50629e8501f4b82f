"""Bulk embedding from and to S3: a real server of the protocol, s3fs, and runs that are killed in the middle."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fsspec.core import url_to_fs

from models.artifact import load
from models.embedder import Embedder, normalize
from scale import bulk, sources
from scale.corpus import referenced
from scale.output import Run, sampled
from scale.places import PlaceError, Remote, place
from tests.support.bulk import command, png
from tests.support.process import until
from tests.support.s3 import contents, s3_server

pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
COUNT = 30
A_SHARD = 3


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with s3_server() as system:
        system.mkdir("data")
        for index in range(COUNT):
            system.pipe_file(f"data/photos/class{index % 2}/{index:02d}.png", png(index))
        system.pipe_file("data/photos/class0/bad.png", b"no image")
        system.mkdir("rows")
        yield system


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILES_A_SHARD", A_SHARD)


def run(source: str, encoder: Path, out: str, **options: Any) -> list[str]:
    """Embed into a place; the names of the shards that were done now."""
    done = list[str]()
    left = bulk.begin(place(out), encoder, sources.shards(source), **options)
    bulk.run_local(left, encoder, place(out), done=lambda it: done.append(it.name))
    return done


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_a_store_gets_what_a_folder_gets(store: Any, small_artifact: Path, tmp_path: Path, form: str) -> None:
    there, here = f"s3://rows/{form}/of-all", str(tmp_path / "out")
    for out in (there, here):
        assert len(run("s3://data/photos", small_artifact, out, file_format=form, inputs=True)) == 11
    assert contents(store, there) == contents(store, here)
    assert bulk.report(place(there)) == bulk.report(Path(here))
    assert run("s3://data/photos", small_artifact, there, file_format=form, inputs=True) == []
    wanted = [3, 28, 11]
    for one, other in zip(
        sampled(Run.of(place(there)), place(there), wanted),
        sampled(Run.of(Path(here)), Path(here), wanted),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_the_rows_are_those_of_the_images(store: Any, small_artifact: Path, tmp_path: Path) -> None:
    run("s3://data/photos", small_artifact, "s3://rows/checked")
    rows = dict[str, Any]()
    for name, data in contents(store, "s3://rows/checked").items():
        if name.endswith(".parquet"):
            for it in pq.read_table(io.BytesIO(data)).to_pylist():
                assert it["id"] not in rows
                rows[it["id"]] = it
    assert len(rows) == COUNT + 1
    assert "no image in a known format" in rows["class0/bad.png"]["error"]
    files = []
    for index in range(COUNT):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(png(index))
    expected = normalize(Embedder(load(small_artifact)).embed_files(files))
    found = torch.tensor([rows[f"class{index % 2}/{index:02d}.png"]["embedding"] for index in range(COUNT)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_tar_parquet_and_a_list_are_read(store: Any, small_artifact: Path) -> None:
    import pyarrow as pa

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(3):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(png(index))
            tar.addfile(member, io.BytesIO(png(index)))
    store.pipe_file("data/tars/some.tar", buffer.getvalue())
    table = io.BytesIO()
    pq.write_table(pa.table({"id": ["x", "y"], "image": [png(0), png(1)]}), table)
    store.pipe_file("data/tables/some.parquet", table.getvalue())
    store.pipe_file("data/list.txt", b"s3://data/photos/class0/00.png\ns3://data/photos/gone.png\n")
    found = {}
    for source, name in (
        ("s3://data/tars", "tars"),
        ("s3://data/tables/some.parquet", "tables"),
        ("s3://data/list.txt", "list"),
    ):
        run(source, small_artifact, f"s3://rows/{name}")
        [file] = [it for it in store.find(f"s3://rows/{name}") if it.endswith(".parquet")]
        found[name] = {it["id"]: it["error"] for it in pq.read_table(io.BytesIO(store.cat_file(file))).to_pylist()}
    assert found["tars"] == dict.fromkeys(["0.png", "1.png", "2.png"])
    assert found["tables"] == {"x": None, "y": None}
    assert found["list"]["s3://data/photos/class0/00.png"] is None
    assert "does not exist" in found["list"]["s3://data/photos/gone.png"]


@pytest.mark.parametrize("form", ["parquet", pytest.param("npy", marks=pytest.mark.soak)])
def test_a_killed_run_goes_on_to_the_same_bytes(store: Any, small_artifact: Path, tmp_path: Path, form: str) -> None:
    out = f"s3://rows/killed-{form}"
    process = subprocess.Popen(
        command(A_SHARD, "s3://data/photos", small_artifact, out, form),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    until(lambda: process.poll() is not None or sum(it.endswith(f".{form}") for it in store.find(out)) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = {it for it in contents(store, out) if it.endswith(f".{form}")}
    done = run("s3://data/photos", small_artifact, out, file_format=form)
    assert not complete & {f"{it}.{form}" for it in done}
    assert len(complete) + len(done) == 11
    run("s3://data/photos", small_artifact, str(tmp_path / "whole"), file_format=form)
    assert contents(store, out) == contents(store, str(tmp_path / "whole"))


def test_what_was_cut_off_before_its_rows_is_done_again(store: Any, small_artifact: Path) -> None:
    """The rows are uploaded last: a shard with moments and without rows is no complete shard."""
    out = "s3://rows/cut"
    run("s3://data/photos", small_artifact, out)
    before = contents(store, out)
    [gone, *_] = sorted(it for it in before if it.endswith(".parquet"))
    store.rm_file(f"{out}/{gone}")
    assert run("s3://data/photos", small_artifact, out) == [gone.removesuffix(".parquet")]
    assert contents(store, out) == before


def test_a_store_that_takes_no_writes_ends_the_run(
    store: Any, small_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(bulk.BulkError, match=r"s3://no-such-bucket/rows.*bucket"):
        run("s3://data/photos", small_artifact, "s3://no-such-bucket/rows")
    out = "s3://rows/refusing"
    [system] = {url_to_fs(address)[0] for address in (out, "s3://data")}
    pipe = system.pipe_file
    uploads = 0

    def refusing(path: str, content: bytes) -> None:
        nonlocal uploads
        uploads += 1
        if uploads > 6:
            raise PermissionError("Access Denied")
        pipe(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(system, "pipe_file", refusing)
        with pytest.raises(bulk.BulkError, match=r"cannot be written: s3://rows/refusing/.*Access Denied"):
            run("s3://data/photos", small_artifact, out)
    names = contents(store, out)
    assert sum(it.endswith(".parquet") for it in names) == 2
    assert len(run("s3://data/photos", small_artifact, out)) == 9


def test_the_same_rules_hold_as_in_a_folder(store: Any, small_artifact: Path) -> None:
    out = "s3://rows/ruled"
    run("s3://data/photos", small_artifact, out)
    with pytest.raises(bulk.BulkError, match="holds rows as parquet, not as npy"):
        run("s3://data/photos", small_artifact, out, file_format="npy")
    with pytest.raises(bulk.BulkError, match="shards that this source does not have"):
        run("s3://data/photos/class1", small_artifact, out)
    with pytest.raises(bulk.BulkError, match="no descriptors"):
        referenced(place(out), small_artifact)
    with pytest.raises(bulk.BulkError, match=r"s3://rows/nothing holds no output"):
        bulk.report(place("s3://rows/nothing"))


def test_only_stores_whose_writes_are_all_or_nothing() -> None:
    with pytest.raises(
        PlaceError, match=r"sftp://host/rows: rows are written to a folder or to an object store \(s3, "
    ):
        place("sftp://host/rows")
    assert place("rows/out") == Path("rows/out")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PlaceError, match=r"s3://rows/x: .*pip install 'fullrank-server\[bulk,s3\]'"):
        place("s3://rows/x")


def test_an_address_behaves_as_a_path_where_output_needs_it(store: Any) -> None:
    folder = place("s3://rows/some/folder/")
    assert isinstance(folder, Remote)
    file = folder / "a.json"
    assert (str(file), file.name, folder.resolve()) == ("s3://rows/some/folder/a.json", "a.json", folder)
    assert not file.exists()
    assert folder.glob("*.json") == []
    with pytest.raises(FileNotFoundError):
        file.read_text()
    file.write_bytes("ä".encode())
    (folder / "b" / "c.json").write_bytes(b"deeper")
    assert folder.glob("*.json") == [file]
    assert file.read_text() == "ä"
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()
