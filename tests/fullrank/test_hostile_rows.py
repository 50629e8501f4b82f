"""Every measure of rank lies in its range or is not given, whatever the rows: a seeded sweep over hostile ones."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.coverage import window

BOUNDED = ("effective_rank", "rankme", "stable_rank", "numerical_rank", "basis_effective_rank")


def hostile() -> Iterator[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(3)

    def normal(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=g)

    for n, d in ((1, 16), (2, 16), (3, 16), (33, 16), (70, 300), (256, 32), (400, 1), (400, 2), (30, 512)):
        yield f"normal {n} x {d}", normal(n, d)
        yield f"all equal {n} x {d}", normal(1, d).expand(n, -1).clone()
        point = torch.zeros(n, d)
        point[:, 0] = 1
        for opposite in (1, 2):
            rows = point + 1e-4 * normal(n, d)
            rows[:opposite] = -rows[:opposite]
            yield f"{opposite} opposite of {n} x {d}", rows
        yield f"one direction {n} x {d}", normal(n, 1) * normal(1, d)
        for scale in (1e-30, 1e-12, 1e12, 1e30):
            yield f"scale {scale} {n} x {d}", scale * normal(n, d)
        yield f"float16 {n} x {d}", (1e-3 * normal(n, d) + 1).half()
        yield f"bfloat16 {n} x {d}", (1e-2 * normal(n, d) + 1).bfloat16()
        rows = normal(n, d)
        rows[:: max(1, n // 3)] = math.inf
        rows[1 :: max(2, n // 5)] = math.nan
        yield f"infinite and NaN {n} x {d}", rows
        yield f"lengths from 1e-20 to 1e20 {n} x {d}", normal(n, d) * 10 ** (20 * torch.rand(n, 1, generator=g) - 10)
        yield f"zeros beside one row {n} x {d}", torch.cat((torch.zeros(n, d), normal(1, d)))
        yield f"copies of three {n} x {d}", normal(3, d)[torch.randint(3, (n,), generator=g)]


HOSTILE = dict(hostile())


@pytest.mark.parametrize("name", HOSTILE)
def test_measures_of_rank_lie_in_their_range_or_are_not_given(name: str) -> None:
    rows = HOSTILE[name]
    d = rows.shape[1]
    found = window(rows)
    for measure in BOUNDED:
        value = float(getattr(found, measure))
        assert math.isnan(value) or value == 0 or 1 - 1e-9 <= value <= d * (1 + 1e-9), (measure, value)
    ratio = found.participation_ratio
    for value in (ratio.lower, ratio.estimate, ratio.upper):
        assert math.isnan(value) or value == 0 or 1 <= value <= d, ratio
    known = [it for it in (ratio.lower, ratio.estimate, ratio.upper) if not math.isnan(it)]
    assert known == sorted(known)
    # What is not given has a reason, or there were no rows to speak of.
    for measure, value in (("participation_ratio", ratio.estimate), ("effective_rank", found.effective_rank)):
        assert not math.isnan(value) or measure in found.unknown or found.rows < 2, measure


@pytest.mark.parametrize(("n", "d"), [(70, 300), (30, 512)])
def test_few_rows_of_many_dimensions_leave_the_spectrum_open(n: int, d: int) -> None:
    found = window(HOSTILE[f"normal {n} x {d}"])
    given = (found.effective_rank, found.rankme, found.stable_rank)
    assert all(math.isnan(it) for it in given)
    assert {"effective_rank", "rankme", "stable_rank", "numerical_rank"} <= found.unknown.keys()
