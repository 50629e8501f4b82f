"""The table of encoders: its twins are what it says they are, and its page is what was measured."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks._page import write_between
from benchmarks.encoders import MARKS, TWINS, accuracy, of_pixels, plan, table, twin
from benchmarks.encoders_picture import picture
from models.artifact import load
from training.data import SAMPLE, ImageSet, read_fashion_mnist
from training.report import PARTS, RunLog


@pytest.fixture(scope="module")
def images() -> tuple[ImageSet, ImageSet]:
    return read_fashion_mnist(SAMPLE, "train"), read_fashion_mnist(SAMPLE, "test")


def test_a_twin_has_random_weights_and_statistics_of_its_kind(
    small_artifact: Path, images: tuple[ImageSet, ImageSet]
) -> None:
    """Every BatchNorm of the measured twin passes on zero mean and unit variance; the other divides by one."""
    artifact = load(small_artifact)
    twins = {kind: twin(artifact.card, images[0].images, 1, kind).encoder for kind in TWINS}
    weights = [dict(encoder.named_parameters())["conv1.weight"] for encoder in twins.values()]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], dict(artifact.encoder.named_parameters())["conv1.weight"])
    moments: dict[str, list[tuple[float, float]]] = {kind: [] for kind in TWINS}
    for kind, encoder in twins.items():
        assert not encoder.training
        for layer in encoder.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.momentum == 0.1

                def see(_: nn.Module, __: object, out: torch.Tensor, kind: str = kind) -> None:
                    moments[kind].append((float(out.mean().abs()), float(out.var())))

                layer.register_forward_hook(see)
        mean, std = artifact.card.preprocessing.mean[0], artifact.card.preprocessing.std[0]
        with torch.no_grad():
            encoder((images[0].images.float() / 255 - mean) / std)
    assert max(mean for mean, _ in moments["measured"]) < 0.1
    assert all(0.8 < variance < 1.2 for _, variance in moments["measured"])
    assert max(abs(variance - 1) for _, variance in moments["initial"]) > 0.5


def test_the_mean_is_the_training_images_and_the_probe_does_not_see_it(images: tuple[ImageSet, ImageSet]) -> None:
    raw, centred = (of_pixels(name, *images) for name in ("raw pixels", "raw pixels, mean taken off"))
    assert raw["linear"] == centred["linear"]
    assert raw["knn"] != centred["knn"]
    assert centred["total_variance"] > raw["total_variance"]


def test_the_plan_measures_each_architecture_s_twins_once(
    small_artifact: Path, images: tuple[ImageSet, ImageSet]
) -> None:
    keys = [key for key, _ in plan([small_artifact, small_artifact], *images, seeds=2)]
    assert [kind for _, kind, _ in keys].count("encoder") == 2
    assert [(kind, seed) for _, kind, seed in keys if kind in TWINS] == [
        ("initial", 0),
        ("measured", 0),
        ("initial", 1),
        ("measured", 1),
    ]


def test_an_accuracy_has_its_standard_error_or_the_deviation_between_seeds() -> None:
    assert accuracy([0.8], 10_000) == f"80.0 ± {100 * math.sqrt(0.16 / 10_000):.1f}"
    assert accuracy([0.70, 0.72], 10_000) == f"71.0 ± {100 * math.sqrt(2) * 0.01:.1f}"


def test_the_page_holds_the_table(tmp_path: Path) -> None:
    shared = {
        "dataset": "fashion",
        "dimension": 4,
        "knn_queries": 100,
        "participation_ratio": 2.0,
        "total_variance": 0.5,
    }
    shared |= {"effective_rank": 3.0, "linear": 0.5}
    found = [
        shared | {"name": "raw pixels", "kind": "pixels", "seed": 0, "knn": 0.5},
        shared | {"name": "net", "kind": "initial", "seed": 0, "knn": 0.6},
        shared | {"name": "net", "kind": "initial", "seed": 1, "knn": 0.6},
        shared | {"name": "net", "kind": "measured", "seed": 0, "knn": 0.4},
        shared | {"name": "mine", "kind": "encoder", "seed": 0, "knn": 0.9, "epochs": 3, "projection": None},
    ]
    lines = table(found).splitlines()
    assert len(lines) == 6
    assert lines[3].startswith("| net, untrained, initial BatchNorm statistics |  | 60.0 ± 0.0 |")
    assert lines[5].startswith("| **mine** | 3 | 90.0 ± 3.0 | 50.0 ± 5.0 | 3.0 of 4 | 2.0 | 0.500 |  | 1 |")
    begin, end = (mark.format("fashion") for mark in MARKS)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter")
    write_between(page, begin, end, table(found))
    assert "**mine**" in page.read_text()
    assert "old" not in page.read_text()


def test_the_picture_has_a_row_a_run_and_a_line_an_epoch() -> None:
    spectrum = {"dimension": 4, "ranks": [1, 2, 4], "eigenvalues": [2.0, 0.2, 0.0]}
    logs = [
        RunLog(name, [{"epoch": n + 1, "knn": 0.5, **dict.fromkeys(PARTS, spectrum)} for n in range(epochs)], {})
        for name, epochs in (("short", 2), ("long", 3))
    ]
    axes = picture(logs).axes
    assert len(axes) == 6
    assert [len(axes[at].lines) for at in (1, 2, 4, 5)] == [2, 2, 3, 3]
    assert axes[0].get_title() == "short: kNN %, held-out images"
    assert list(axes[3].lines[0].get_xydata()[:, 1]) == [50.0, 50.0, 50.0]
    assert list(axes[1].lines[0].get_xydata()[:, 1]) == [1.0, 0.1, 1e-7]
