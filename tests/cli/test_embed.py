"""`fullrank embed`: the good is written, the bad is named, and what was there before is never half overwritten."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from cli import app
from models.artifact import load
from models.embedder import Embedder, normalize
from service.settings import PRETRAINED

BOOT = Path(__file__).parents[2] / "examples" / "ankle-boot.png"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A good image, one that is cut off, and another good one."""
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / name for name in ("[a].png", "cut.png", "b.png")]
    for path in paths:
        path.write_bytes(BOOT.read_bytes())
    paths[1].write_bytes(BOOT.read_bytes()[:100])
    return paths


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["embed", *map(str, arguments)], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout, result.stderr


def test_lines_hold_the_embedding_or_the_error(files: list[Path], small_artifact: Path) -> None:
    code, out, err = run(*files, "--encoder", small_artifact)
    assert code == 1
    first, second, third = map(json.loads, out.splitlines())
    expected = normalize(Embedder(load(small_artifact)).embed_files([BOOT])).numpy()[0]
    np.testing.assert_allclose(first["embedding"], expected, atol=1e-6)
    assert third["embedding"] == first["embedding"]
    assert set(second) == {"file", "error"}
    assert "cut.png" in err
    assert "1 of 3 images" in err


@pytest.mark.parametrize(
    ("url", "words"), [("http://127.0.0.1:80a", "Invalid port: '80a'"), ("http://[::1", "Invalid")]
)
def test_an_address_that_is_none_is_said_in_a_sentence(url: str, words: str) -> None:
    code, out, err = run(BOOT, "--url", url)
    assert (code, out) == (1, "")
    assert err.startswith(f"fullrank: url: {url!r} is no address: {words}")


def test_the_good_rows_are_written_with_their_names(files: list[Path], small_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.npy"
    assert run(*files, "--encoder", small_artifact, "--out", out)[0] == 1
    assert np.load(out).shape == (2, 32)
    assert (tmp_path / "rows.txt").read_text().splitlines() == [str(files[0]), str(files[2])]


def test_a_full_disk_leaves_the_old_file(
    files: list[Path], small_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.npy"
    np.save(out, np.zeros((1, 32), np.float32))
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(files[0], "--encoder", small_artifact, "--out", out)
    assert code == 1
    assert "rows.txt: No space left on device" in err
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_embedded_into_a_folder_and_resumed(
    files: list[Path], small_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows"
    code, printed, err = run(files[0].parent, "--encoder", small_artifact, "--out", out, "--json")
    assert code == 0, err
    report = json.loads(printed)
    assert (report["shards"], report["rows"], report["errors"], report["dimension"]) == (1, 3, 1, 32)
    assert "1 bad" in err
    [file] = out.glob("*.parquet")
    written = file.stat().st_mtime_ns
    assert pq.read_table(file)["id"].to_pylist() == ["[a].png", "b.png", "cut.png"]
    assert run(files[0].parent, "--encoder", small_artifact, "--out", out)[0] == 0
    assert file.stat().st_mtime_ns == written


def test_a_precision_is_computed_in_and_resumed_in(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PRETRAINED / "cifar10-directclr"
    expected = normalize(Embedder(load(encoder), dtype=torch.bfloat16).embed_files([BOOT])).numpy()[0]
    line = json.loads(run(files[0], "--encoder", encoder, "--dtype", "bfloat16")[1])
    np.testing.assert_allclose(line["embedding"], expected, atol=1e-6)
    folder = (files[0].parent, "--encoder", encoder, "--out", tmp_path / "rows", "--json")
    code, printed, err = run(*folder, "--dtype", "bfloat16")
    assert (code, json.loads(printed)["dtype"]) == (0, "bfloat16"), err
    code, _, err = run(*folder)
    assert (code, "computed in bfloat16, not in float32" in err) == (1, True)
    monkeypatch.setenv("FULLRANK_DTYPE", "bfloat16")
    assert run(*folder)[0] == 0


def test_an_encoder_too_coarse_for_a_precision_is_refused_before_anything_is_written(
    files: list[Path], small_artifact: Path, tmp_path: Path
) -> None:
    """This one, with random weights, keeps the cosine 0.9999 on three images of its canary and not on all."""
    out = tmp_path / "rows"
    for source, where in ((files[0].parent, ("--out", out)), (files[0], ())):
        code, printed, err = run(source, "--encoder", small_artifact, *where, "--dtype", "bfloat16")
        assert (code, printed) == (1, "")
        assert "small: in bfloat16 its canary images give embeddings of cosine 0.9998" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.png"], "either --encoder or --url"),
        (["x", "y", "--encoder", "e", "--out", "rows"], "give one source"),
        (["nowhere", "--encoder", "{encoder}", "--out", "{tmp}/rows"], "no file and no folder"),
        (["{tmp}/images", "--encoder", "{tmp}", "--out", "{tmp}/rows"], "encoder.json"),
        (["{tmp}/images", "--encoder", "{encoder}", "--out", "{tmp}/images/rows"], "lies in the source"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], says: str, small_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(BOOT.read_bytes())
    code, _, err = run(*(it.format(encoder=small_artifact, tmp=tmp_path) for it in arguments))
    assert code in (1, 2)
    assert says in err


def test_a_name_that_is_no_unicode_keeps_its_bytes_beside_its_row(small_artifact: Path, tmp_path: Path) -> None:
    names = [b"not\xffunicode.png", "ü.png".encode()]
    files = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for file in files:
        file.write_bytes(BOOT.read_bytes())
    code, _, err = run(*files, "--encoder", small_artifact, "--out", tmp_path / "rows.npy")
    assert code == 0, err
    assert (tmp_path / "rows.txt").read_bytes().splitlines() == [os.fsencode(file) for file in files]
    assert np.load(tmp_path / "rows.npy").shape[0] == 2


@pytest.mark.parametrize("option", [("--ray", "local"), ("--reference", "e"), ("--processes", "2")])
def test_what_only_a_folder_of_rows_takes_is_refused_elsewhere(
    small_artifact: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    code, out, err = run(BOOT, "--encoder", small_artifact, "--out", tmp_path / "rows.npy", *option)
    assert (code, out) == (2, "")
    assert f"{option[0]} needs a folder of rows: name one with --out" in err
