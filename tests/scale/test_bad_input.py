"""What `fullrank embed SOURCE --out DIR` makes of bad sources and bad places: an error that names them, or a row."""

import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli import app
from scale import bulk, sources
from scale.places import place
from scale.sources import Shard
from tests.support.images import encoded, noise

PNG = encoded(noise((40, 30), "L", 1))
Embed = Callable[..., tuple[int, str]]


@pytest.fixture
def embed(small_artifact: Path, tmp_path: Path) -> Embed:
    """Exit code and complaints of the command, for a source and an output folder."""

    def run(source: Path, out: Path = tmp_path / "out", *more: str) -> tuple[int, str]:
        arguments = ["embed", str(source), "--encoder", str(small_artifact), "--out", str(out), *more]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stderr

    return run


def rows(out: Path) -> dict[str, str | None]:
    """id -> error."""
    tables = [pq.read_table(file).to_pylist() for file in sorted(out.glob("*.parquet"))]
    return {it["id"]: it["error"] for table in tables for it in table}


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    scratch = path.with_suffix(".member")
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            scratch.write_bytes(data)
            archive.add(scratch, name)
    scratch.unlink()
    return path


def test_a_source_without_one_good_image_fails(embed: Embed, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("a.png\nb.png\n")
    code, said = embed(listed)
    assert code == 1
    assert f"no image of {listed} has an embedding; the errors in {tmp_path / 'out'} say why" in said
    assert rows(tmp_path / "out") == {
        name: f"[Errno 2] No such file or directory: '{name}'" for name in ("a.png", "b.png")
    }


def test_a_list_that_names_an_image_twice_is_refused(embed: Embed, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("a.png\n\nb.png\r\n a.png\n")
    code, said = embed(listed)
    assert code == 1
    assert f"{listed}: line 4 is line 1 again, 'a.png'" in said
    assert "remove it" in said


def test_a_list_in_another_encoding_is_refused(embed: Embed, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("ä.png\n", "latin-1")
    code, said = embed(listed)
    assert code == 1
    assert f"{listed} is not UTF-8" in said
    assert "save the list as UTF-8" in said


def test_names_in_a_list_may_be_strange_and_what_is_no_file_is_a_row_with_an_error(
    embed: Embed, tmp_path: Path
) -> None:
    strange = tmp_path / "a\u2028b\x85c \U0001f984.png"
    strange.write_bytes(PNG)
    os.mkfifo(tmp_path / "pipe.png")
    listed = tmp_path / "list.txt"
    names = [str(strange), str(tmp_path / "pipe.png"), "nul\0.png", str(tmp_path), str(tmp_path / ("x" * 300))]
    listed.write_text("\ufeff" + "\n".join(names), "utf-8")
    assert embed(listed)[0] == 0
    found = rows(tmp_path / "out")
    assert list(found) == names
    assert found[str(strange)] is None
    assert "is no regular file" in str(found[names[1]])
    assert "null" in str(found[names[2]])
    assert "is no regular file" in str(found[names[3]])
    assert "too long" in str(found[names[4]])


@pytest.mark.parametrize("form", ["parquet", "npy"])
def test_names_of_files_may_hold_anything(embed: Embed, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"line\nbreak.png", "\U0001f984 ü.png".encode(), b"not\xffunicode.png", b'"quoted".png'):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(PNG)
    out = tmp_path / "out"
    code, said = embed(folder, out, "--format", form)
    assert code == 0, said
    names = {"line\nbreak.png", "\U0001f984 ü.png", "not\\udcffunicode.png", '"quoted".png'}
    if form == "parquet":
        assert rows(out) == dict.fromkeys(names)
    else:
        [lines] = out.glob("*.jsonl")
        assert len(lines.read_text().splitlines()) == 4
    assert embed(folder, out, "--format", form)[0] == 0


def test_two_images_of_one_webdataset_key_are_two_rows(embed: Embed, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", ("0001.jpg", PNG), ("0001.mask.png", PNG), ("0001.json", b"{}"))
    assert embed(tmp_path / "a.tar")[0] == 0
    assert rows(tmp_path / "out") == {"0001.jpg": None, "0001.mask.png": None}


def test_an_id_that_comes_twice_in_a_shard_is_named_and_the_other_shards_are_done(embed: Embed, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tar(data / "bad.tar", ("x.png", PNG), ("y.png", PNG), ("x.png", PNG))
    tar(data / "empty.tar", ("x.txt", b"text"))
    tar(data / "good.tar", ("x.png", PNG))
    code, said = embed(data)
    assert code == 1
    assert f"{data / 'bad.tar'}: two images have the id 'x.png'" in said
    assert f"{data / 'empty.tar'} holds no images (.jpg" in said
    assert "2 of 3 shards could not be read" in said
    assert {it.name for it in (tmp_path / "out").glob("*.parquet")} == {"good.parquet"}


def damaged(content: bytes, second: int, kind: str) -> bytes:
    """A tar archive whose second member begins at this byte, with a fault."""
    return {
        "header": content[: second + 10] + b"?" + content[second + 11 :],
        "cut at a member": content[:second],
        "cut in a header": content[: second + 100],
        "cut in a member": content[: second + 600],
        "two in one": content * 2,
    }[kind]


@pytest.mark.parametrize("kind", ["header", "cut at a member", "cut in a header", "cut in a member", "two in one"])
def test_a_damaged_archive_is_named_and_none_of_its_images_is_lost_in_silence(
    embed: Embed, tmp_path: Path, kind: str
) -> None:
    whole = tar(tmp_path / "whole.tar", ("a.png", PNG), ("b.png", PNG), ("c.png", PNG))
    with tarfile.open(whole) as archive:
        second = archive.getmembers()[1].offset
    bad = tmp_path / "bad.tar"
    bad.write_bytes(damaged(whole.read_bytes(), second, kind))
    code, said = embed(bad)
    assert code == 1
    assert f"{bad}: " in said
    assert "holds no complete shard yet" in said
    assert rows(tmp_path / "out") == {}
    assert embed(whole, tmp_path / "other")[0] == 0
    assert len(rows(tmp_path / "other")) == 3


@pytest.mark.parametrize("name", ["parquet", "jsonl", "moments.safetensors", "float8"])
def test_a_damaged_file_of_the_output_is_named_and_the_run_goes_on_without_it(
    embed: Embed, tmp_path: Path, name: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for index in range(3):
        (data / f"{index}.png").write_bytes(PNG)
    form = "parquet" if name in ("parquet", "float8") else "npy"
    more = ("--format", form)
    assert embed(data, out, *more)[0] == 0
    [row_file] = out.glob(f"*.{form}")
    ending = "moments.safetensors" if name == "float8" else name
    [file] = out.glob(f"*.{ending}")
    if name == "float8":
        save_file({key: it.to(torch.float8_e4m3fn) for key, it in load_file(file).items()}, file)
    else:
        file.write_bytes(file.read_bytes()[: 40 if name == "jsonl" else -20])
    code, said = embed(data, out, *more)
    assert code == 1, said
    assert f"{row_file.stem}." in said
    assert f"if that lasts, remove {row_file.name} and run again" in said
    row_file.unlink()
    assert embed(data, out, *more)[0] == 0


def test_what_a_parquet_file_lacks_is_named(embed: Embed, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"picture": [PNG]}), data / "column.parquet")
    pq.write_table(pa.table({"image": [PNG, PNG], "id": ["a", None]}), data / "id.parquet")
    broken = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"image": [PNG], "id": broken}), data / "unicode.parquet")
    pq.write_table(pa.table({"image": [PNG], "id": pa.array([1 << 62], pa.timestamp("us"))}), data / "time.parquet")
    pq.write_table(pa.table({"image": [PNG, None, b""], "id": [1, 2, 3]}), data / "good.parquet")
    (data / "torn.parquet").write_bytes((data / "good.parquet").read_bytes()[:-20])
    code, said = embed(data)
    assert code == 1
    assert (
        "column.parquet: no column of images; it is called image, bytes, jpg, png, content; there are picture" in said
    )
    assert "id.parquet: row 1 has no id" in said
    assert "unicode.parquet: 'utf-8' codec can't decode" in said
    assert "torn.parquet: " in said
    assert "time.parquet: " in said
    assert "5 of 6 shards could not be read" in said
    found = rows(tmp_path / "out")
    assert found["1"] is None
    assert found["2"] == "expected image bytes, got NoneType"
    assert "empty" in str(found["3"])


def test_shards_of_one_name_keep_their_own_files(embed: Embed, tmp_path: Path) -> None:
    """Also if one of them comes later: nothing is taken for another's."""
    data = tmp_path / "data"
    for name in ("b/x.tar", "c/x.tar", "c/x.2.tar", "long/" + "n" * 240 + ".tar"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        tar(data / name, (f"{name[:8]}.png", PNG))
    assert embed(data)[0] == 0
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    assert len(rows(tmp_path / "out")) == 4
    (data / "a").mkdir()
    tar(data / "a" / "x.tar", ("a.png", PNG))
    assert embed(data)[0] == 0
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 5
    assert len(rows(tmp_path / "out")) == 5


def test_rows_among_the_images_are_refused(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for out in (tmp_path, tmp_path / "rows"):
        code, said = embed(tmp_path, out)
        assert code == 1
        assert f"{out} lies in the source {tmp_path}: the next run would take rows for images" in said
    assert not (tmp_path / "rows").exists()


def test_the_library_refuses_rows_among_the_images_as_the_command_does(small_artifact: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(PNG)
    (tmp_path / "link").symlink_to(images)
    found = sources.shards(str(images))
    for out in (images, tmp_path / "link" / "rows", tmp_path / "images" / ".." / "images" / "rows"):
        with pytest.raises(bulk.BulkError, match=r"lies in the source .*images: .*choose another --out"):
            bulk.begin(out, small_artifact, found)
    assert [it.name for it in images.iterdir()] == ["a.png"]
    beside = tmp_path / "images-rows"
    assert bulk.begin(beside, small_artifact, found) == found
    stored = [Shard("a", "tar", ("memory:///corpus/a.tar",), "memory:///corpus/")]
    with pytest.raises(bulk.BulkError, match="lies in the source memory"):
        bulk.begin(place("memory:///corpus/rows"), small_artifact, stored)
    assert bulk.begin(place("memory:///corpus-rows"), small_artifact, stored) == stored


def test_a_file_in_the_place_of_the_folder_is_named(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(PNG)
    (tmp_path / "file").write_text("x")
    code, said = embed(tmp_path / "data", tmp_path / "file")
    assert code == 2
    assert f"--out: {tmp_path / 'file'} is a file; name a folder" in said


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_in_a_shard_ends_the_run_and_the_next_run_goes_on(
    embed: Embed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file system of 40 kB."""
    monkeypatch.setattr(sources, "FILES_A_SHARD", 8)
    data = tmp_path / "data"
    data.mkdir()
    for index in range(32):
        (data / f"{index}.png").write_bytes(PNG)
    out = tmp_path / "small"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        code, said = embed(data, out)
        assert code == 1
        assert "the output cannot be written: [Errno 28] No space left on device" in said
        assert "run the same command again to go on" in said
        complete = len(list(out.glob("*.parquet")))
        assert 0 < complete < 4
        assert not [it for it in out.iterdir() if it.name.startswith(".")]
        subprocess.run(["mount", "-o", "remount,size=1m", str(out)], check=True)
        code, said = embed(data, out)
        assert code == 0, said
        assert len(rows(out)) == 32
    finally:
        subprocess.run(["umount", str(out)], check=False)
