"""A whole run on the sample: it learns, resumes exactly, keeps its hands off other runs, and ends in an artifact."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.artifact import Architecture, load
from models.embedder import Embedder, normalize
from training.data import SAMPLE, DataError
from training.loop import Run, TrainingError, train
from training.methods import METHODS
from training.recipes import RECIPES, Recipe, recipe

QUIET = Console(file=io.StringIO())


def small(method: str = "directclr", **changes: object) -> Recipe:
    tiny = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2")
    options = {"directclr": {"d0": 8}, "simclr": {"hidden": 16}, "byol": {"hidden": 16, "projection": 8}}[method]
    return replace(recipe(f"fashion-{method}"), architecture=tiny, options=options, epochs=2, **changes)  # type: ignore[arg-type]


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "directclr"
    train(small(), Run(out, data=SAMPLE), QUIET)
    return out


def test_a_run_ends_in_an_artifact_that_serves(finished: Path) -> None:
    records, artifact = log(finished), load(finished / "encoder")
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["loss"] < records[0]["loss"]
    assert artifact.card.training["method"] == "directclr"
    assert artifact.card.training["epochs"] == 2
    assert artifact.card.quality["knn_queries"] == 1000
    assert 0.5 < artifact.card.quality["knn"] <= 1
    assert artifact.card.quality["projection"]["dimension"] == 8
    assert artifact.reference is not None
    assert artifact.reference.rows == 150  # a fifth of 1,000 held out, a quarter of those the canary
    assert artifact.canary is not None
    rows = normalize(Embedder(artifact).embed(artifact.canary.images))
    torch.testing.assert_close(rows, artifact.canary.embeddings, rtol=0, atol=1e-5)


def test_a_broken_and_resumed_run_is_the_unbroken_one(finished: Path, tmp_path: Path) -> None:
    """Stop after the first epoch, as a killed process would have left it, then resume."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small(), Run(out, data=SAMPLE), Interrupt())
    assert len(log(out)) == 1
    artifact = train(small(), Run(out, data=SAMPLE, resume=True), QUIET)
    assert [record["loss"] for record in log(out)] == [record["loss"] for record in log(finished)]
    assert artifact.card.revision == load(finished / "encoder").card.revision


class Interrupt(Console):
    """A console that is interrupted when the first epoch's line is printed."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO())

    def print(self, *objects: object, **options: object) -> None:  # type: ignore[override]
        raise KeyboardInterrupt


def test_a_folder_that_holds_a_run_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--resume"):
        train(small(), Run(finished, data=SAMPLE), QUIET)
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    with pytest.raises(TrainingError, match="is a run of fashion-directclr, not of fashion-byol"):
        train(small("byol"), Run(copy, data=SAMPLE, resume=True), QUIET)


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_the_other_methods_train_too(method: str, tmp_path: Path) -> None:
    train(replace(small(method), epochs=1), Run(tmp_path / "run", data=SAMPLE), QUIET)
    assert load(tmp_path / "run" / "encoder").card.training["method"] == method


def test_too_small_a_set_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="raise --limit"):
        train(small(), Run(tmp_path / "run", data=SAMPLE, limit=200), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+; the last checkpoint is intact"):
        train(small(learning_rate=1e30), Run(tmp_path / "run", data=SAMPLE), QUIET)


def test_unknown_options_and_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="depth"):
        train(replace(small(), options={"depth": 3}), Run(tmp_path / "run", data=SAMPLE), QUIET)
    with pytest.raises(ValueError, match="fashion-directclr"):
        recipe("fashion-directclear")


def test_every_recipe_builds_its_method() -> None:
    for name in RECIPES:
        chosen = recipe(name)
        assert chosen.name == name
        method = METHODS[chosen.method](chosen.architecture.build(), **chosen.options)
        assert method.encoder.dimension >= 256


def test_a_run_can_start_from_an_encoder(finished: Path, tmp_path: Path) -> None:
    """At a learning rate of almost nothing the weights stay those of the encoder it started from."""
    out = tmp_path / "run"
    start = finished / "encoder"
    changed = train(replace(small(learning_rate=1e-12), epochs=1), Run(out, data=SAMPLE, init=start), QUIET)
    before = load(start).encoder.state_dict()["layer4.1.conv2.weight"]
    torch.testing.assert_close(changed.encoder.state_dict()["layer4.1.conv2.weight"], before, rtol=0, atol=1e-6)
    with pytest.raises(TrainingError, match="not name='resnet18' width=32"):
        train(replace(recipe("fashion-directclr"), epochs=1), Run(tmp_path / "wide", data=SAMPLE, init=start), QUIET)
    assert not (tmp_path / "wide").exists()
