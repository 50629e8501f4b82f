"""The guard barks at what has collapsed and at nothing else; a set of black images ends in words, not a traceback."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import guard as benchmark
from fullrank.verdict import VARIANCE_FLOOR
from models.artifact import load
from models.gate import Figures
from tests.support.training import OPTIONS, TINY
from training.data import SAMPLE, ImageSet, Split, read_fashion_mnist
from training.data.idx import write_idx
from training.guard import ONE_DIRECTION, Geometry, Guard, is_a_point, measure_statistics, twins
from training.loop import Run, TrainingError, train
from training.recipes import Recipe, recipe
from training.trainer import Trainer


def figures(spread: float, directions: int = 16, d: int = 16) -> Figures:
    """Of rows around one direction, with noise of that much variance in so many others."""
    noise = torch.randn(512, d, generator=torch.Generator().manual_seed(0)) * (spread / directions) ** 0.5
    noise[:, directions:] *= 1e-4
    return Figures.of(torch.cat([torch.ones(512, 1), noise], dim=1))


def geometry(h: float = 0.2, z: float = 0.2, **shape: int) -> Geometry:
    return Geometry(figures(h, **shape), figures(z))


def record(epoch: int, loss: float, steps: int = 100) -> dict[str, float]:
    return {"epoch": epoch, "step": steps * epoch, "loss": loss}


TWIN = geometry(0.05, 0.05)


def test_a_representation_or_a_projection_without_spread_is_a_collapse() -> None:
    guard = Guard([TWIN, geometry(0.3, 0.7)], trivial_loss=0.0)
    assert guard(record(1, 0.4), geometry(0.02, 0.02)) is None, "narrower than either twin, but not gone"
    said = guard(record(2, 0.1), geometry(0.2, 0.001))
    assert said is not None
    assert "collapse in epoch 2: the projection's total variance 0.001" in said
    assert f"at least {VARIANCE_FLOOR:.3g}" in said
    assert "the representation's total variance" in str(guard(record(3, 0.1), geometry(1e-4, 0.2)))


def test_a_run_is_not_compared_with_its_own_past() -> None:
    guard = Guard([TWIN], trivial_loss=4.8)
    assert [guard(record(epoch, 4.0), geometry(h)) for epoch, h in ((1, 0.9), (2, 0.3), (3, 0.02))] == [None] * 3


def test_directions_that_died_and_one_that_holds_everything() -> None:
    guard = Guard([TWIN], None)
    assert "alive" in str(guard(record(1, 0.0), geometry(0.2, directions=4)))
    one = Figures.of(torch.cat([torch.ones(512, 1), torch.linspace(-1, 1, 512)[:, None], figures_noise()], dim=1))
    assert one.participation_ratio < ONE_DIRECTION
    assert "one direction holds all" in str(guard(record(1, 0.0), Geometry(one, figures(0.2))))


def figures_noise() -> torch.Tensor:
    return 0.01 * torch.randn(512, 15, generator=torch.Generator().manual_seed(1))


def test_a_loss_at_its_trivial_value_is_named_when_it_stays_there() -> None:
    guard = Guard([TWIN], trivial_loss=4.844)
    assert guard(record(1, 4.84), geometry()) is None, "it may still be warming up"
    assert "the loss, 4.84, is what an encoder gets that gives every image the same row" in str(
        guard(record(2, 4.84), geometry())
    )
    assert guard(record(3, 4.5), geometry()) is None
    assert "same row" in str(guard(record(4, 4.84), geometry(z=0.001))), "at once beside another fault"
    assert guard(record(5, 4.84), geometry()) is not None


def test_a_resumed_run_remembers_the_last_epoch() -> None:
    guard = Guard([TWIN], trivial_loss=4.844)
    guard.recall(record(1, 4.84))
    assert "same row" in str(guard(record(2, 4.84), geometry()))
    guard.recall(record(2, 4.5))
    assert guard(record(3, 4.84), geometry()) is None
    guard.recall(record(1, 1.0) | {"guard": "collapse in epoch 1: the loss"})  # type: ignore[dict-item]
    assert guard(record(2, 1.0, steps=10), geometry(1e-3)) is not None


def test_before_batch_norm_has_settled_a_fault_has_to_last() -> None:
    guard = Guard([TWIN], None)
    assert [bool(guard(record(n, 1.0, steps=10), geometry(h))) for n, h in ((1, 1e-3), (2, 0.2), (3, 1e-3))] == [
        False
    ] * 3
    assert guard(record(4, 1.0, steps=10), geometry(1e-3)) is not None
    assert guard(record(6, 1.0, steps=10), geometry(1e-3)) is not None


def test_a_twin_that_sees_nothing_either_leaves_the_floors() -> None:
    nothing = Figures.of(torch.ones(512, 16))
    assert is_a_point(nothing)
    assert not is_a_point(figures(1e-4))
    guard = Guard([Geometry(nothing, nothing)], None)
    assert guard(record(1, 0.0), Geometry(nothing, nothing)) is not None
    assert guard(record(1, 0.0), geometry()) is None


@pytest.mark.parametrize("share", [0.0, 1.0, 50.0])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Guard([TWIN], None, share)


def small(method: str, **changes: object) -> Recipe:
    settings: dict[str, object] = {"architecture": TINY, "options": OPTIONS[method], "epochs": 3, "batch_size": 64}
    return replace(recipe(f"fashion-{method}"), **(settings | changes))  # type: ignore[arg-type]


def test_the_twin_is_untrained_whatever_the_run_began_with() -> None:
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 400))
    trainer = Trainer(small("simclr"), Split.of(images, 200, seed=0))
    before = twins(trainer)
    trainer.train_epoch()
    after = twins(trainer)
    assert [twin.statistics for twin in before] == ["initial", "measured"]
    assert before[0].geometry == after[0].geometry
    assert before[1].geometry == after[1].geometry
    assert before[0].geometry != before[1].geometry


def test_measured_statistics_are_those_of_the_images() -> None:
    images = read_fashion_mnist(SAMPLE, "train").take(slice(0, 400))
    trainer = Trainer(small("simclr"), Split.of(images, 200, seed=0))
    measure_statistics(trainer.method, trainer)
    pixels = (trainer.split.labelled.images.float() / 255 - 0.286) / 0.353
    rows = trainer.method.encoder.conv1(pixels).transpose(0, 1).flatten(1)
    torch.testing.assert_close(trainer.method.encoder.bn1.running_mean, rows.mean(1), rtol=1e-3, atol=1e-4)
    assert trainer.method.encoder.bn1.momentum == 0.1


HEALTHY = ("DirectCLR", "BYOL")
BROKEN = ("BYOL, neither predictor nor stop-gradient", "SimCLR on black images")


@pytest.mark.parametrize("name", [*HEALTHY, *BROKEN])
def test_short_runs_are_told_apart(name: str) -> None:
    """A handful of `python -m benchmarks.guard`, smaller."""
    case = next(case for case in (*benchmark.HEALTHY, *benchmark.BROKEN) if case.name == name)
    said = list(benchmark.verdicts(replace(case, images=1000), read_fashion_mnist(SAMPLE, "train"), 8, 3))
    assert any(said) == (name in BROKEN), said


@pytest.mark.soak
@pytest.mark.parametrize("case", [*benchmark.HEALTHY, *benchmark.BROKEN], ids=lambda case: case.name)
def test_forty_short_runs_are_told_apart(case: benchmark.Case) -> None:
    images = read_fashion_mnist(Path("/usr/share/datasets/fashion-mnist"), "train")
    said = list(benchmark.verdicts(case, images, 8, 4))
    assert any(said) == case.broken, said


def test_the_guard_stops_a_run_that_collapses(tmp_path: Path) -> None:
    options = OPTIONS["byol"] | {"predictor": False, "stop_gradient": False, "projector": False}
    run = Run(tmp_path / "run", data=SAMPLE, guard="stop")
    with pytest.raises(TrainingError, match=r"collapse in epoch \d: the representation's .* The guard stopped the run"):
        train(small("byol", options=options, epochs=8, learning_rate=0.5), run, Console(file=io.StringIO()))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert "collapse" in str(records[-1]["guard"])
    assert set(records[0]["untrained"]) == {"initial", "measured"}
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_black_images_end_in_words(tmp_path: Path) -> None:
    sets: dict[str, ImageSet] = {split: read_fashion_mnist(SAMPLE, split) for split in ("train", "test")}
    for prefix, images in zip(("train", "t10k"), sets.values(), strict=True):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", torch.zeros_like(images.images[:, 0]))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", images.labels.to(torch.uint8))
    console = Console(file=io.StringIO(), width=400)
    made = train(small("simclr", epochs=2), Run(tmp_path / "run", data=tmp_path), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "collapse in epoch 1" in printed
    assert "gives every image the same row" in printed
    assert made.card.quality["collapsed"].startswith("collapsed: total variance 0 on")
    assert load(tmp_path / "run" / "encoder").reference is None
    with pytest.raises(TrainingError, match="The guard stopped the run"):
        train(small("simclr", epochs=2), Run(tmp_path / "stopped", data=tmp_path, guard="stop"), console)
