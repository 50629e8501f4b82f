"""The benchmark's changes of traffic: each is what its name says."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.detection import pictures
from benchmarks.detection.cases import Bench, Case
from benchmarks.detection.crowds import FIRST_HALF, NIGHT_ROWS, SEASON, WEAK, crowds
from models.artifact import load
from tools.architecture import ROOT
from training.data import SAMPLE
from training.data.idx import read_fashion_mnist

IMAGES, ROWS = 100, 6000
OTHER = {
    "a tenth": 0.1,
    "a fifth": 0.2,
    "a twentieth": 0.05,
    "a third": 1 / 3,
    "a quarter": 0.25,
    "half are": 0.5,
    ", half": 0.5,
    "40 %": 0.4,
    "two thirds": 2 / 3,
    "is stuck": 1.0,
    "in turn, one zooms": 0.5,
}


@pytest.fixture(scope="module")
def made() -> tuple[Bench, torch.Tensor, dict[str, Case]]:
    images = read_fashion_mnist(SAMPLE, "test").take(slice(IMAGES))
    pretrained = ROOT / "models" / "pretrained"
    bench = Bench(load(pretrained / "fashion-byol"), images.images, images.labels)
    cases = crowds(bench, load(pretrained / "fashion-directclr"))
    named = {case.name: case for case in cases}
    assert len(named) == len(cases)
    return bench, images.labels, named


def test_both_sides_are_counted(made: tuple[Bench, torch.Tensor, dict[str, Case]]) -> None:
    bench, _, cases = made
    kinds = [case.kind for case in cases.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"traffic": 16, "none": 6, "model": 9}
    assert {name for name, case in cases.items() if not case.strong} == set(WEAK)
    for case in cases.values():
        drawn = (case.draw or bench.traffic.independent)(ROWS)
        assert len(drawn) == (NIGHT_ROWS if "night" in case.name else ROWS)
        assert int(drawn.max()) < len(case.pool) == len(case.inputs)
        blamed = case.kind == "model" and "cache" not in case.name
        assert blamed == (not torch.equal(case.canary, bench.canary)), case.name


def test_shares_are_those_of_the_names(made: tuple[Bench, torch.Tensor, dict[str, Case]]) -> None:
    _, _, cases = made
    tried = 0
    for name, case in cases.items():
        share = next((share for words, share in OTHER.items() if words in name), None)
        if share is not None and case.kind != "model" and case.draw is not None:
            others = case.draw(ROWS) < len(case.pool) - IMAGES
            assert float(others.float().mean()) == pytest.approx(share, abs=0.03), name
            tried += 1
    assert tried == 13


def test_classes_and_repetitions(made: tuple[Bench, torch.Tensor, dict[str, Case]]) -> None:
    _, labels, cases = made

    def drawn(name: str) -> torch.Tensor:
        draw = cases[name].draw
        assert draw is not None
        return draw(ROWS)

    season = torch.isin(labels[drawn("a season of two classes")], torch.tensor(SEASON)).float()
    assert float(season[:100].mean()) < 0.5
    assert float(season[3000:].mean()) > 0.85
    assert set(labels[drawn("half of the classes vanish")].tolist()) == set(FIRST_HALF)
    assert set(labels[drawn("night, a batch of two classes")].tolist()) == set(SEASON)
    assert bool((labels[drawn("a crawler takes class after class")].diff() >= 0).all())
    assert torch.equal(*drawn("each request three times").view(-1, 3).T[:2])
    first = drawn("a cache in front, no image twice")[:IMAGES]
    assert len(first.unique()) == IMAGES
    once, again = drawn("two replicas in turn, one older, each request twice").view(-1, 2).T
    assert torch.equal(once + IMAGES, again)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 50)])
def test_pictures_are_images(channels: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((12, channels, size, size))
    smooth = torch.nn.functional.interpolate(torch.rand(12, channels, 6, 6, generator=generator), size=size)
    images = (smooth * 255).to(torch.uint8)
    drawn: list[Callable[..., torch.Tensor]] = [
        pictures.noise,
        pictures.blank,
        pictures.logos,
        pictures.screenshots,
    ]
    made = [draw(12, shape, generator) for draw in drawn]
    made += [pictures.collages(images), pictures.zoomed(images), pictures.burst(images[:3], 12, generator)]
    made += [pictures.grained(images, generator)]
    for each in made:
        assert (each.shape, each.dtype) == (shape, torch.uint8)
        assert len(each.flatten(1).unique(dim=0)) == 12
        assert not torch.equal(each, images)
    assert pictures.no_image(shape).shape == (1, *shape[1:])
