"""Where bulk embedding reads images: folders, tar files, Parquet, lists, object storage; and what it refuses."""

import shutil
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scale import bulk, sources
from tests.support.bulk import png, rows_of, run


def test_tar_parquet_and_lists_give_the_same_rows(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, str(file.relative_to(images)))
    ids = [str(file.relative_to(images)) for file in files]
    cells = [file.read_bytes() for file in files]
    pq.write_table(pa.table({"id": ids, "image": cells}), tmp_path / "plain.parquet")
    pq.write_table(
        pa.table({"id": ids, "image": [{"bytes": it, "path": None} for it in cells]}), tmp_path / "hf.parquet"
    )
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)) + "\n")
    found = []
    for name in ("shard.tar", "plain.parquet", "hf.parquet", "list.txt"):
        out = tmp_path / f"{name}-out"
        assert run(str(tmp_path / name), small_artifact, out) == []
        found.append({key.removeprefix(f"{images}/"): value for key, value in rows_of(out).items()})
    assert all(it == found[0] for it in found)
    assert len(found[0]) == 41


def test_a_source_that_changed_is_refused_and_no_id_comes_twice(
    images: Path, small_artifact: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images / "class1", data)
    run(str(data), small_artifact, tmp_path / "out")
    (data / "new.png").write_bytes(png(500))
    with pytest.raises(bulk.BulkError, match=r"1 shards .* added or removed"):
        run(str(data), small_artifact, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 20


def test_object_storage_gives_the_same_rows(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in sorted(images.rglob("*.png")):
        store.pipe_file(f"/bucket/{file.relative_to(images)}", file.read_bytes())
    store.pipe_file("/lists/all.txt", b"memory://bucket/class0/00.png\nmemory://bucket/gone.png\n")
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    store.pipe_file("/tars/some.tar", (tmp_path / "some.tar").read_bytes())
    for source in ("memory://bucket", "memory://lists/all.txt", "memory://tars/"):
        assert run(source, small_artifact, tmp_path / source.rstrip("/").rpartition("/")[2]) == []
    run(str(images), small_artifact, tmp_path / "local")
    there, here = rows_of(tmp_path / "bucket"), rows_of(tmp_path / "local")
    assert there == {name: row for name, row in here.items() if name != "class0/text.jpg"}
    listed = rows_of(tmp_path / "all.txt")
    assert "gone.png" in str(listed["memory://bucket/gone.png"][1])
    torch.testing.assert_close(
        torch.tensor(listed["memory://bucket/class0/00.png"][0]), torch.tensor(here["class0/00.png"][0])
    )
    assert set(rows_of(tmp_path / "tars")) == {"00.png"}
    with pytest.raises(sources.SourceError, match=r"nosuch://bucket/.*rotocol"):
        sources.shards("nosuch://bucket/")
    with pytest.raises(sources.SourceError, match="holds no images"):
        sources.shards("memory://empty/")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "no file and no folder"),
        ("empty", "holds no images"),
        ("empty.txt", "one path or address a line"),
        ("model.bin", "expected a folder, a .tar"),
        ("s3://bucket/key.csv", "expected a folder, a .tar"),
    ],
)
def test_a_bad_source_is_named(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(sources.SourceError, match=says):
        sources.shards(source if "://" in source else str(tmp_path / source))


def test_a_files_name_is_no_command(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    name = "pipe:touch PWNED; cat x.tar #.tar"
    with tarfile.open(data / name, "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    assert run(str(data), small_artifact, tmp_path / "out") == []
    assert len(rows_of(tmp_path / "out")) == 1
    assert not list(tmp_path.rglob("PWNED"))
    assert not Path("PWNED").exists()


def test_an_unreadable_shard_is_left_for_the_next_run(images: Path, small_artifact: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "good.tar", "w") as tar:
        tar.add(images / "class0" / "00.png", "00.png")
    whole = (data / "good.tar").read_bytes()
    (data / "torn.tar").write_bytes(whole[:700])
    [failure] = run(str(data), small_artifact, tmp_path / "out")
    assert "torn.tar" in failure
    assert set(rows_of(tmp_path / "out")) == {"00.png"}
    (data / "torn.tar").write_bytes(whole)
    assert run(str(data), small_artifact, tmp_path / "out") == []
    assert {file.stem for file in (tmp_path / "out").glob("*.parquet")} == {"good", "torn"}
