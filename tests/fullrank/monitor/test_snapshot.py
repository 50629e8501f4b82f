import dataclasses
import itertools
import math
from itertools import pairwise

import pytest
import torch

from fullrank import Moments, Reference
from fullrank.bounds import jackknife
from fullrank.calibration.sequential import LEVEL, Evidence
from fullrank.measures import mean_cosine
from fullrank.monitor.snapshot import Counters, SnapshotMaker
from fullrank.monitor.window import Block, Ring
from fullrank.statistics import NORM_BINS, measure

D, WINDOWS = 16, (300.0, 3600.0)


def rows_of(n, seed):
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows)


@pytest.fixture(scope="module")
def reference():
    return Reference.build(rows_of(1000, 1), rows_of(1000, 2), calibrate=False)


def block(now, n, seed):
    moments = Moments(D, torch.zeros(D)).add(rows_of(n, seed))
    return Block(now, now, moments, torch.ones(D).double(), torch.ones(NORM_BINS))


class Bench:
    """A maker of snapshots on a clock and a ring of its own; `measured` lists the rows of each measurement made."""

    def __init__(self, reference, monkeypatch):
        self.now, self.measured, self.seed = 0.0, [], 10
        self.ring = Ring(WINDOWS)
        self.refresher = SnapshotMaker(D, reference, WINDOWS, lambda: self.now)
        monkeypatch.setattr("fullrank.monitor.snapshot.measure", self.measure)
        self.refresh(everything=True)
        self.measured.clear()

    def measure(self, seconds, blocks, reference, dimension):
        self.measured.append(sum(block.moments.count for block in blocks))
        return measure(seconds, blocks, reference, dimension)

    def add(self, n):
        self.seed += 1
        self.ring.add(block(self.now, n, self.seed))

    def refresh(self, evidence=None, *, everything=False):
        snapshot = self.refresher.refresh(self.ring, evidence or Evidence(), Counters(), everything)
        self.windows = snapshot.windows
        return snapshot


@pytest.fixture
def bench(reference, monkeypatch):
    return Bench(reference, monkeypatch)


def test_a_refresh_measures_one_window_and_each_as_often_as_it_changes(bench):
    bench.add(64)
    bench.now = 301.0
    bench.add(32)
    bench.refresh(everything=True)
    assert bench.measured == [32, 96]
    long = bench.windows[3600.0]
    for _ in range(11):  # 110 s
        bench.now += 10.0
        bench.add(2)
        bench.refresh()
    assert bench.measured == [32, 96, *range(34, 56, 2)]
    assert bench.windows[3600.0] is long
    bench.now += 10.0
    bench.refresh()
    bench.refresh()
    assert bench.measured[-1] == 64 + 32 + 22
    assert bench.windows[3600.0].rows == 118
    assert bench.windows[300.0].rows == 54
    assert [w.seconds for w in bench.windows.values()] == list(WINDOWS)


def test_windows_that_hold_the_same_rows_are_measured_once(bench):
    bench.add(64)
    bench.refresh(everything=True)
    assert bench.measured == [64]
    short, long = bench.windows.values()
    assert short.eigenvalues is long.eigenvalues
    assert (short.seconds, long.seconds) == WINDOWS


def test_rows_that_stay_the_same_are_not_measured_again(bench):
    bench.add(64)
    bench.refresh(everything=True)
    bench.now = 200.0
    bench.refresh(everything=True)
    assert bench.measured == [64]
    bench.now = 301.0  # they leave the short window, without a change to the ring
    bench.refresh(everything=True)
    assert bench.measured == [64, 0]
    assert [w.rows for w in bench.windows.values()] == [0, 64]


def test_other_rows_in_their_place_are_measured(bench):
    bench.add(64)
    bench.refresh(everything=True)
    before = bench.windows[300.0].eigenvalues
    other = Ring(WINDOWS)
    other.add(block(0.0, 64, 99))
    bench.ring.load(other.tensors(0.0), 0.0)
    bench.refresh(everything=True)
    assert not torch.equal(bench.windows[300.0].eigenvalues, before)


def test_a_refresh_is_followed_by_a_rest_of_twenty_times_its_length(bench, monkeypatch):
    assert not bench.refresher.due()
    monkeypatch.setattr("fullrank.monitor.snapshot.time.monotonic", itertools.count().__next__)  # a second of work each
    bench.now = 130.0
    assert bench.refresher.due()
    bench.refresh()
    bench.now = 149.9
    assert not bench.refresher.due()
    bench.now = 150.0
    assert bench.refresher.due()


def test_the_rows_since_a_change_take_turns_with_the_windows(bench):
    for _ in range(4):
        bench.now += 10.0
        bench.add(64)
    bench.refresh(everything=True)
    bench.measured.clear()
    evidence = Evidence(math.log10(LEVEL), "band 1 high", since=20.0)
    assert evidence.alarm
    bench.refresh(evidence)
    assert bench.measured == [128]  # a change is measured at once: the two blocks after the one it began with
    assert bench.windows[300.0].rows == 256
    bench.now += 10.0
    bench.add(64)
    bench.refresh(evidence)
    bench.refresh(evidence)
    assert sorted(bench.measured[1:]) == [192, 320]
    bench.refresh()
    assert list(bench.windows) == list(WINDOWS)


def test_rows_of_one_batch_in_which_a_change_began_count_as_since_the_change(bench):
    for time in (10.0, 20.0, 20.0, 20.0):
        bench.now = time
        bench.add(64)
    bench.refresh(everything=True)
    bench.measured.clear()
    bench.refresh(Evidence(math.log10(LEVEL), "band 1 high", since=20.0))
    assert bench.measured == [128]


def expected_bounds(whole, rest, groups):
    """The participation ratio and its bounds, of groups of rows of which none are copies of each other."""
    counts = [len(it) for it in groups]
    traces = whole.traces()
    left_out = [1 / Moments.participation_ratio(it) for it in rest]
    half = jackknife(1 / whole.participation_ratio(), left_out, torch.tensor(counts).double())
    estimate, t, square = whole.participation_ratio(), math.sqrt(traces.trace_squared), traces.square_trace
    theta, shares = 1 / estimate, [n / sum(counts) for n in counts]
    bias = sum((1 - share) * it for share, it in zip(shares, left_out, strict=True)) - (len(counts) - 1) * theta
    apart = [it.mean(0) - torch.cat(groups).mean(0) for it in groups]
    lag = sum(float(a @ b) for a, b in pairwise(apart)) / (len(apart) - 1)
    r = min(0.5, max(0.0, lag / (sum(float(a @ a) for a in apart) / len(apart)) + 1 / len(apart)))
    grown = (1 + r) / (1 - r)
    relative, high = half * estimate * math.sqrt(grown), bias / theta * grown
    unseen = 3 / whole.count * (1 + float(whole.mean().norm())) ** 2
    lower = (
        estimate
        * math.exp(-relative + min(0.0, high))
        * (t + unseen) ** 2
        / (square + 2 * unseen * square / t + unseen**2)
    )
    upper = estimate / (1 - relative - max(0.0, high)) * (t + unseen) ** 2 / t**2
    return [lower * square / t**2, estimate, min(upper, float(whole.dimension))]


def test_after_many_changes_of_the_ring_a_window_says_what_its_rows_say():
    d, now, rows = 70, 0.0, []
    generator = torch.Generator().manual_seed(3)
    ring, refresher = Ring(WINDOWS), SnapshotMaker(d, None, WINDOWS, lambda: now)
    for step in range(241):
        now += 40.0 * float(torch.rand((), generator=generator))
        n = int(torch.randint(2, 90, (), generator=generator))
        x = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) ** -0.5 + step / 80
        rows.append(torch.nn.functional.normalize(x.double()))
        # As after a restart, not all blocks are summed about the same shift.
        moments = Moments(d, torch.full((d,), step // 100 / 20)).add(rows[-1])
        ring.add(Block(now, now, moments, torch.ones(d).double(), torch.ones(NORM_BINS)))
        if step % 8 == 0:
            windows = refresher.refresh(ring, Evidence(), Counters(), step % 80 == 0).windows
        if step and step % 80 == 0:
            for seconds, measured in windows.items():
                counts = [block.moments.count for block in ring.within(seconds, now)]
                held = torch.cat(rows)[-sum(counts) :]
                whole, groups = Moments(d).add(held), held.split(counts)
                rest = [torch.cat([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))]
                bounds = expected_bounds(whole, [Moments(d).add(it) for it in rest], groups)
                assert dataclasses.astuple(measured.participation_ratio) == pytest.approx(bounds, rel=1e-9)
                eigenvalues = torch.linalg.eigvalsh(held.T.cov()).flip(0)
                torch.testing.assert_close(measured.eigenvalues, eigenvalues, rtol=1e-9, atol=1e-15)
                assert measured.effective_rank == pytest.approx(whole.effective_rank(), rel=1e-9)
                assert measured.mean_cosine == pytest.approx(mean_cosine(held), rel=1e-9)
                assert measured.rows == len(held)
                assert 3 <= measured.groups <= 20
