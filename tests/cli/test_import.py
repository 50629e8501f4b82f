"""`fullrank import`: a checkpoint becomes an encoder with a reference, or an error and nothing on the disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli import app
from models import references
from models.artifact import load
from models.backbones import ResNet
from tests.support.images import encoded, photo

runner = CliRunner()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "my resnet.pth"
    torch.save(ResNet("resnet18", width=4, stem="3x3").state_dict() | {"fc.weight": torch.ones(2, 32)}, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(150):
        (folder / f"{i}.png").write_bytes(encoded(photo((40 + i % 7, 40), i)))
    return folder


def test_an_import_writes_an_encoder_with_reference_and_canary(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    command = ["import", str(checkpoint), "--out", str(tmp_path / "encoder"), "--set", "size=32", "--data", str(images)]
    result = runner.invoke(app, [*command, "--name", "mine", "--licence", "MIT", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["kept"] == 120
    assert said["dropped"]["the classifier or projector behind the representation"] == {
        "count": 1,
        "first": "fc.weight",
    }
    assert said["assumed"] == {"stem": "3x3"}
    artifact = load(tmp_path / "encoder")
    assert artifact.card.name == "mine"
    assert artifact.card.revision == said["revision"]
    assert artifact.card.source is not None
    assert artifact.card.source.licence == "MIT"
    assert artifact.reference is not None
    assert artifact.reference.rows == said["reference"]["rows"] == 75
    assert artifact.canary is not None
    assert np.isfinite(artifact.reference.participation_ratio)


def test_the_report_names_what_was_assumed_and_how_to_say_otherwise(checkpoint: Path, tmp_path: Path) -> None:
    result = runner.invoke(app, ["import", str(checkpoint), "--out", str(tmp_path / "e")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for words in ("stem: 3x3 (--set stem=...)", "1 tensors", "not stated", "fullrank reference"):
        assert words in result.stdout
    result = runner.invoke(app, ["import", str(tmp_path / "e"), "--out", str(tmp_path / "again"), "--name", "new"])
    assert result.exit_code == 0, result.output
    first, second = load(tmp_path / "e"), load(tmp_path / "again")
    assert (second.card.name, second.card.revision) == ("new", first.card.revision)


def test_nested_dimensions_reach_the_card_from_every_source(checkpoint: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "e", tmp_path / "again"
    result = runner.invoke(app, ["import", str(checkpoint), "--out", str(out), "--nested-dimensions", "16, 8,8"])
    assert result.exit_code == 0, result.output
    assert load(out).card.nested_dimensions == (8, 16)
    result = runner.invoke(app, ["import", str(out), "--out", str(again)])
    assert result.exit_code == 0, result.output
    assert load(again).card.nested_dimensions == (8, 16)
    result = runner.invoke(app, ["import", str(out), "--out", str(again), "--nested-dimensions", "4"])
    assert load(again).card.nested_dimensions == (4,)
    assert load(again).card.revision == load(out).card.revision  # whole rows are the same
    for text, code, words in (
        ("4,x", 2, "write whole numbers"),
        ("9" * 5000, 2, "write whole numbers"),
        ("64", 1, "between 1 and the embedding's 32"),
    ):
        for source in (checkpoint, out):
            result = runner.invoke(
                app, ["import", str(source), "--out", str(tmp_path / "no"), "--nested-dimensions", text]
            )
            assert (result.exit_code, (tmp_path / "no").exists()) == (code, False)
            assert words in " ".join(result.output.split())


def test_a_refusal_writes_nothing(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "embedded", None)  # too few images are found out before any is embedded
    broken = tmp_path / "broken.pth"
    broken.write_bytes(checkpoint.read_bytes()[:-5000])
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(images / "0.png", few)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for arguments, code, words in (
        ([str(broken)], 1, "truncated or damaged"),
        ([str(checkpoint), "--family", "moco"], 1, "there are no tensors below"),
        ([str(checkpoint), "--out", "mine"], 2, "exists and is no encoder"),
        ([str(checkpoint), "--out", "broken.pth/e", "--data", str(images)], 2, "broken.pth is a file; name a folder"),
        ([str(checkpoint), "--out", "e", "--data", "few"], 1, "too few"),
        ([str(checkpoint), "--out", "e", "--data", "nowhere"], 1, "is not a folder"),
        ([str(checkpoint), "--weights", "best"], 2, "neither online nor ema"),
        ([str(checkpoint), "--set", "stem"], 2, "write KEY=VALUE"),
        ([str(checkpoint), "--preprocess", "few/0.png"], 1, "no JSON file"),
        (["nowhere.pth"], 1, "does not exist"),
    ):
        result = runner.invoke(app, ["import", *arguments])
        assert result.exit_code == code, (arguments, result.output)
        assert words in " ".join(result.output.split()), (arguments, result.output)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_strangers_names_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    torch.save({"\x1b[31m" + "x" * 100_000: torch.ones(2)}, tmp_path / "c.pth")
    result = runner.invoke(app, ["import", str(tmp_path / "c.pth"), "--out", str(tmp_path / "e")])
    assert result.exit_code == 1
    assert "\x1b[31mx" not in result.output
    assert "\\x1b[31mx" in result.output
    assert len(result.output) < 5000
