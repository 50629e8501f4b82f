"""What the table of methods says about its runs follows from them."""

from dataclasses import replace

import pytest
import torch

from benchmarks.methods import CLAIMS, REASONS, SCALES, Claim, configurations, knn, page, recipe_of, run, summary
from training.data import SAMPLE, load_data
from training.methods import METHODS, build

CLAIM = Claim("a over b", "someone", knn, "a", "b")


def records(a: list[float], b: list[float]) -> list[dict[str, object]]:
    return [{"name": name, "seed": s, "knn": x} for name, xs in (("a", a), ("b", b)) for s, x in enumerate(xs)]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.8, 0.7], [0.6, 0.5], "75 against 55: seen"),
        ([0.5, 0.5], [0.6, 0.6], "50 against 60: **not seen**"),
        ([0.8, 0.5], [0.6, 0.6], "65 against 60: **unclear**, the seeds disagree"),
        ([0.8, 0.8], [], "not measured"),
        ([0.8], [0.6, 0.99], "80 against 60: seen"),
    ],
)
def test_a_claim_is_seen_only_if_every_seed_shows_it(a: list[float], b: list[float], verdict: str) -> None:
    assert CLAIM.verdict(records(a, b)) == verdict


def test_parity_is_of_the_means() -> None:
    level = replace(CLAIM, tolerance=2)
    assert level.verdict(records([0.80, 0.82], [0.82, 0.80])).endswith(": seen")
    assert level.verdict(records([0.80, 0.80], [0.85, 0.84])).endswith("**not seen**")


def test_a_run_that_diverged_counts_for_nothing() -> None:
    broken = {"name": "a", "seed": 1, "error": "the loss is nan"}
    assert CLAIM.verdict([*records([0.8], [0.6, 0.5]), broken]) == "80 against 60: seen"
    assert "| SimCLR | diverged |" in page("small", [{**broken, "name": "SimCLR"}])
    assert "| SimCLR | not run |" in page("small", [])


def test_a_cell_holds_the_mean_and_half_the_range() -> None:
    assert summary(knn, [{"knn": 0.5}], 1) == "50.0"
    assert summary(knn, [{"knn": 0.5}, {"knn": 0.7}], 1) == "60.0 ± 10.0"


def test_claims_name_configurations_and_configurations_cover_the_methods() -> None:
    for scale in SCALES.values():
        table = configurations(scale)
        names = [each.name for each in table]
        assert len(names) == len(set(names))
        assert {each.method for each in table} == set(METHODS)
        assert {name for claim in CLAIMS + REASONS for name in (claim.first, claim.second)} <= set(names)
        for each in configurations(replace(scale, width=2, wide=8)):
            recipe = recipe_of(each, replace(scale, width=2, wide=8), seed=1)
            build(recipe.method, recipe.architecture.build(), recipe.options)


def test_a_run_measures() -> None:
    scale = replace(SCALES["small"], width=4, images=128, tests=64, epochs=1, wide=16)
    threads = torch.get_num_threads()
    chosen = next(each for each in configurations(scale) if each.name == "DirectPred")
    record = run(chosen, scale, 0, load_data("fashion", SAMPLE), "cpu")  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    assert 0 <= record["knn"] <= 1
    assert record["h"]["dimension"] == 32
    assert record["z"]["dimension"] == 128
    assert record["alignment"] > 0.99
