"""The encoders we ship are what we say they are, on the sample that lies beside them."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import models
from benchmarks.encoders import table
from cli import app
from models.artifact import Artifact, load
from models.embedder import Embedder, normalize
from models.gate import judge
from models.references import SYNTHETIC, synthetic_canary
from service import settings
from tools import demo
from training.checkpoint import TrainingError, describe
from training.data import SAMPLE, ImageSet, read_fashion_mnist
from training.evaluate import Spectrum, evaluate_pixels, knn_accuracy
from training.loop import Run
from training.recipes import Recipe

PRETRAINED = Path(models.__file__).parent / "pretrained"
DEFAULT = settings.DEFAULT.name
HEALTHY = ("fashion-byol", "fashion-directclr")
COLOUR = ("cifar10-directclr", "cifar10-byol")
COLLAPSED = demo.COLLAPSED.name
FOLDERS = {name: PRETRAINED / name for name in HEALTHY} | {COLLAPSED: demo.COLLAPSED}


@pytest.fixture(scope="module")
def sample() -> tuple[ImageSet, ImageSet]:
    return read_fashion_mnist(SAMPLE, "train"), read_fashion_mnist(SAMPLE, "test")


@pytest.fixture(scope="module")
def artifacts() -> dict[str, Artifact]:
    return {name: load(folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def rows(artifacts: dict[str, Artifact], sample: tuple[ImageSet, ImageSet]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each encoder's embeddings of both parts."""
    embedders = {name: Embedder(artifact) for name, artifact in artifacts.items()}
    return {name: (it.embed(sample[0].images), it.embed(sample[1].images)) for name, it in embedders.items()}


def test_nothing_else_is_shipped_and_nothing_is_heavy(artifacts: dict[str, Artifact]) -> None:
    assert {path.name for path in PRETRAINED.iterdir()} == {*HEALTHY, *COLOUR}
    for name, artifact in artifacts.items():
        assert artifact.card.name == name
        assert artifact.canary is not None
        assert artifact.canary.licence == "MIT"
        assert sum(path.stat().st_size for path in FOLDERS[name].iterdir()) < 15e6
        assert (FOLDERS[name] / "log.jsonl").read_text().count("\n") == artifact.card.training["epochs"]
        assert artifact.card.training["command"].startswith("fullrank train fashion-")


def test_with_few_labels_training_pays_and_collapse_costs(
    rows: dict[str, tuple[Tensor, Tensor]], sample: tuple[ImageSet, ImageSet]
) -> None:
    """A bank of 100 images a class: the trained encoders, raw pixels, the collapsed encoder, five points apart."""
    train, test = sample
    knn = {"pixels": evaluate_pixels(train, test)["knn"]}
    for name, (bank, queries) in rows.items():
        knn[name] = knn_accuracy(bank, train.labels, queries, test.labels)
    assert knn[DEFAULT] > knn["pixels"] + 0.05
    assert knn["pixels"] > knn[COLLAPSED] + 0.05
    assert knn["fashion-directclr"] > knn["pixels"] + 0.05


def test_the_collapsed_encoder_has_a_fifth_of_the_rank(rows: dict[str, tuple[Tensor, Tensor]]) -> None:
    rank, collapsed = (Spectrum.of(rows[name][1]).participation_ratio for name in (DEFAULT, COLLAPSED))
    assert collapsed <= 0.2 * rank


def test_the_gate_lets_the_default_replace_the_other_and_keeps_the_collapsed_one_out(
    artifacts: dict[str, Artifact],
) -> None:
    incumbent = artifacts["fashion-directclr"]
    passed = {name: judge(Embedder(it), it, incumbent).passed for name, it in artifacts.items()}
    assert passed == {"fashion-byol": True, "fashion-directclr": True, COLLAPSED: False}


@pytest.mark.parametrize("name", HEALTHY)
def test_references_describe_images_nobody_trained_on(
    name: str, artifacts: dict[str, Artifact], rows: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """The reference's held-out split against the test set's sample: the same law, so nearly the same spectrum."""
    reference = artifacts[name].reference
    assert reference is not None
    spectrum = Spectrum.of(rows[name][1])
    assert spectrum.participation_ratio == pytest.approx(reference.participation_ratio, rel=0.1)
    assert spectrum.total_variance == pytest.approx(reference.total_variance, rel=0.05)


@pytest.mark.parametrize("name", COLOUR)
def test_the_colour_encoder_is_whole_and_ships_none_of_its_data(name: str) -> None:
    """CIFAR-10 may not be given away: its canary is drawn, and told apart by the encoder as images are."""
    artifact = load(PRETRAINED / name)
    assert artifact.card.name == name
    assert artifact.card.training["data"] == "cifar10"
    assert artifact.canary is not None
    assert artifact.canary.licence == SYNTHETIC
    drawn = synthetic_canary(artifact.card.preprocessing)
    assert int((artifact.canary.images.int() - drawn.int()).abs().max()) <= 1  # of 255, by another version's rounding
    rows = normalize(Embedder(artifact).embed(artifact.canary.images))
    torch.testing.assert_close(rows, artifact.canary.embeddings, rtol=0, atol=1e-5)
    assert artifact.reference is not None
    assert artifact.reference.participation_ratio > 5
    assert sum(path.stat().st_size for path in (PRETRAINED / name).iterdir()) < 15e6


@pytest.mark.parametrize("name", [*HEALTHY, *COLOUR])
def test_the_page_s_command_still_asks_for_what_the_card_says_was_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of the recipe that `fullrank train` would run today, up to its first step."""
    page = (Path(__file__).parents[2] / "docs" / "measured" / "encoders.md").read_text()
    (command,) = re.findall(rf"^\| `{name}` \| .* \| `fullrank (train .*)` \|$", page, re.MULTILINE)
    asked: list[Recipe] = []

    def ask(recipe: Recipe, run: Run) -> None:
        asked.append(recipe)
        raise TrainingError("asked")

    monkeypatch.setattr("training.loop.train", ask)
    # On a CPU: the card's machine had a GPU, and this one need not.
    CliRunner().invoke(app, [*shlex.split(command.replace(" --device cuda", "")), "--out", str(tmp_path / "run")])
    expected = describe(asked[0])
    said = load(PRETRAINED / name).card.training
    assert {key: said.get(key) for key in expected} == expected


def test_the_page_s_figures_are_of_the_encoders_that_are_shipped() -> None:
    """benchmarks/encoders.jsonl has their revisions, docs/measured/encoders.md its tables; all beat their bars."""
    root = Path(__file__).parents[2]
    found = [json.loads(line) for line in (root / "benchmarks" / "encoders.jsonl").read_text().splitlines()]
    page = (root / "docs" / "measured" / "encoders.md").read_text()
    for dataset in ("fashion", "cifar10"):
        assert table([record for record in found if record["dataset"] == dataset]) in page
    measured = {record["revision"]: record["name"] for record in found if record["kind"] == "encoder"}
    for name, folder in (FOLDERS | {name: PRETRAINED / name for name in COLOUR}).items():
        assert measured[load(folder).card.revision] == name
    of = {record["name"]: record for record in found if record["kind"] == "encoder"}
    for dataset, names in (("fashion", HEALTHY), ("cifar10", COLOUR)):
        bars = [record for record in found if record["dataset"] == dataset and record["kind"] != "encoder"]
        assert {record["kind"] for record in bars} == {"pixels", "initial", "measured"}
        for what in ("knn", "linear"):
            assert min(of[name][what] for name in names) > max(record[what] for record in bars) + 0.01
    raw = {record["dataset"]: record["knn"] for record in found if record["name"] == "raw pixels"}
    assert min(of[name]["knn"] for name in HEALTHY) > raw["fashion"] + 0.03
