"""The participation ratio and its bounds where estimates were once made to lie."""

import math

import pytest
import torch

from benchmarks.coverage import coverage, populations, window
from fullrank import Moments, profile
from fullrank.bounds import independent_rows, lasting, leave_out

POPULATIONS = {f"{it.name} @{it.rows}": it for it in populations()}


def rows_of(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("opposite", [1, 2])
def test_a_few_opposite_rows_make_no_figure(opposite):
    rows = torch.zeros(256, 32)
    rows[:, 0] = 1
    rows += 1e-3 * rows_of(256, 32, 1)
    rows[:opposite, 0] = -1
    found = window(torch.nn.functional.normalize(rows[torch.randperm(256, generator=torch.Generator().manual_seed(2))]))
    ratio = found.participation_ratio
    assert all(math.isnan(it) for it in (ratio.lower, ratio.estimate, ratio.upper, found.effective_rank))
    assert found.unknown["participation_ratio"] == f"about {opposite} of 256 rows carry the variance; 16 are needed"
    assert math.isnan(Moments(32).add(rows).participation_ratio())


@pytest.mark.parametrize("name", POPULATIONS)
def test_bounds_hold_the_truth_or_are_not_given(name):
    # The command measures many more windows. Of 20, bounds of 95 % hold in 17 or more with a probability of 98 %.
    found = coverage(POPULATIONS[name], 20)
    assert found.out_of_range == 0
    assert math.isnan(found.covered) or found.covered >= 17 / 20


def test_a_ratio_never_leaves_its_range():
    for n, d in ((33, 512), (64, 16), (40, 2)):
        for seed in range(5):
            ratio = window(rows_of(n, d, seed)).participation_ratio
            assert 1 <= ratio.lower <= ratio.estimate <= ratio.upper <= d


def test_copies_are_counted_by_their_weight():
    rows = profile.centred(rows_of(20, 8, 1).repeat_interleave(3, 0)).double()
    weight, total = profile.copies(rows).tolist()
    squares = rows.square().sum(1)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    assert total == pytest.approx(sum(float(squares[i] * squares[j]) for i, j in pairs))
    alike = sum(float(squares[i] * squares[j]) for i, j in pairs if i // 3 == j // 3)
    assert weight == pytest.approx(alike)


def test_blocks_share_copies_though_their_means_differ():
    first, second = rows_of(30, 8, 1), rows_of(30, 8, 2)
    second[:10] = first[:10]
    y, z = profile.centred(first), profile.centred(second)
    weight, total = profile.copies(y, z, apart=first.mean(0) - second.mean(0)).tolist()
    a, b = y.double().square().sum(1), z.double().square().sum(1)
    assert weight == pytest.approx(float((a[:10] * b[:10]).sum()), rel=1e-5)
    assert total == pytest.approx(float(a.sum() * b.sum()), rel=1e-5)


@pytest.mark.parametrize("times", [1, 4, 10])
def test_independent_rows_are_those_that_differ(times):
    rows = rows_of(600 // times, 64, 1).repeat(times, 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))]
    copies = torch.cat((profile.copies(profile.centred(rows)), torch.zeros(2))).double()
    assert independent_rows(Moments(64).add(rows).traces(), copies) == pytest.approx(600 / times, rel=0.03)


def test_few_rows_leave_the_span_open_unless_their_law_has_no_more():
    wide = window(rows_of(60, 128, 1))
    assert math.isnan(wide.rankme)
    assert math.isnan(wide.stable_rank)
    assert wide.numerical_rank == 59
    assert wide.unknown["numerical_rank"] == "about 60 independent rows cannot span 128 dimensions; 129 are needed"
    narrow = window(rows_of(60, 8, 1) @ rows_of(8, 128, 2))
    assert narrow.numerical_rank == 8
    assert 1 < narrow.stable_rank < narrow.rankme <= 8.01


def test_a_state_without_copies_still_loads():
    from fullrank import SpectrumMonitor

    with SpectrumMonitor(8, clock=lambda: 0.0) as monitor:
        monitor.observe(rows_of(600, 8, 1))
        assert monitor.flush(60)
        state = {name: tensor for name, tensor in monitor.state().items() if not name.endswith(".copies")}
    with SpectrumMonitor(8, clock=lambda: 0.0) as monitor:
        monitor.restore(state)
        assert monitor.moments().count == 600


def test_the_jackknife_knows_the_bias_of_a_variance_that_is_divided_by_n():
    values = rows_of(60, 1, 1)[:, 0].double()
    rest = [float(torch.cat([values[:i], values[i + 5 :]]).var(correction=0)) for i in range(0, 60, 5)]
    estimate = float(values.var(correction=0))
    # Of single values the correction is exact: it gives the variance over n - 1.
    alone = [float(torch.cat([values[:i], values[i + 1 :]]).var(correction=0)) for i in range(60)]
    assert estimate - leave_out(estimate, alone, torch.ones(60).double()).bias == pytest.approx(
        float(values.var()), rel=1e-9
    )
    assert leave_out(estimate, rest, torch.full((12,), 5.0).double()).bias < 0


def test_groups_that_resemble_their_neighbours_last():
    assert lasting(torch.tensor([1.0, -1.0] * 5)[:, None]) == 1
    assert lasting(torch.zeros(5, 3)) == 1
    independent = [rows_of(10, 64, seed) for seed in range(50)]
    typical = sum(lasting(it - it.mean(0)) for it in independent) / 50
    assert 1 <= typical < 1.2
    steady = torch.linspace(-1, 1, 10)[:, None]
    assert lasting(steady) == pytest.approx(3)


def test_a_window_of_few_sessions_says_that_it_knows_little():
    centres = rows_of(10, 64, 5)
    labels = torch.randint(10, (32,), generator=torch.Generator().manual_seed(7)).repeat_interleave(32)
    together = centres[labels] + 0.7 * rows_of(1024, 64, 6)
    apart = together[torch.randperm(1024, generator=torch.Generator().manual_seed(8))]
    widths = [it.upper - it.lower for it in (window(together).participation_ratio, window(apart).participation_ratio)]
    assert widths[0] > 3 * widths[1]
