"""The benchmark's streams of healthy blocks, which are measured by sums of runs, against the library on the rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.detection import streams
from benchmarks.detection.blocks import binomial_bounds
from benchmarks.detection.runs import BLOCKS_A_DAY, RUN, laws
from benchmarks.detection.streams import LANES, STEPS, WINDOW, Streams, beyond, block_statistics, variances
from fullrank import Reference, profile
from fullrank.calibration.ranges import BLOCK_ROWS, NAMED
from fullrank.calibration.resample import calibrated
from fullrank.calibration.sequential import Detector
from fullrank.calibration.windows import columns, log_ratio
from fullrank.rows import unit
from tests.support.windows import window_statistics

D, CLASSES = 24, 5
NAMES = ["independent", "sessions", "drifting", "unequal sessions", "daylight"]


def drawn(n, seed):
    """Rows (n, d), their classes and how light their images are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(7)) * (torch.arange(D) < 4)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    rows = centres[labels] + torch.randn(n, D, generator=generator) * torch.arange(1, D + 1).float() ** -0.5 + 0.5
    return rows, labels, rows[:, 0]


@pytest.fixture(scope="module")
def made():
    rows, labels, _ = drawn(2000, 2)
    reference = calibrated(
        Reference.build(drawn(2000, 1)[0], rows, calibrate=False), rows, labels, windows=6, blocks=40
    )
    fresh, labels, light = drawn(2000, 3)
    return reference, unit(fresh), laws(reference, unit(fresh), labels, light, 2400, 0), labels, light


@pytest.mark.parametrize("which", range(5), ids=NAMES)
def test_blocks_of_runs_read_as_their_rows_do(made, which, monkeypatch):
    reference, rows, drawn_laws, _, _ = made
    law = drawn_laws[which]
    assert law.name == NAMES[which]
    seen = []
    original = block_statistics
    monkeypatch.setattr(streams, "block_statistics", lambda *given: seen.append(original(*given)) or seen[-1])
    stream = Streams(reference, law, rows, 1)
    stream.take()
    index = law.rows_of(stream.kept[0][0])
    assert index.shape == (WINDOW - 1, BLOCK_ROWS)
    last = seen[0][0, -len(index) :]
    detector = Detector(reference)
    for i in (1, 9, 22):
        block, before = rows[index[i]], rows[index[i - 1]]
        trace, frobenius = profile.block_products(profile.centred(block), profile.centred(before))
        energies = profile.energies_of_rows(profile.centred(block), reference.basis.float()) / BLOCK_ROWS
        named = {"participation_ratio": log_ratio(trace / frobenius / reference.participation_ratio)}
        expected = columns(reference, energies, block.double().mean(0), BLOCK_ROWS, named)
        np.testing.assert_allclose(last[i], expected, rtol=1e-4, atol=1e-5)
    for row in seen[0][0]:
        detector.bet(row[detector.columns], 0.0)
    np.testing.assert_allclose(stream.wealth[:, 0], detector.wealth, atol=1e-9)
    assert stream.tally.blocks == LANES * STEPS
    assert stream.tally.pages == 0


def test_the_laws_are_what_they_say(made):
    _, rows, drawn_laws, labels, light = made
    by_name = {law.name: law for law in drawn_laws}
    runs = labels[by_name["sessions"].rows.view(-1, 32)]
    assert (runs == runs[:, :1]).all()
    changes = (labels[by_name["unequal sessions"].rows.view(-1, RUN)].diff(dim=1) != 0).sum(1) + 1
    assert 1 <= float(changes.double().mean()) < 8
    noon, night = (light[by_name["daylight"].rows[hour]].mean() for hour in (12, 0))
    assert float(noon - night) > 0.2 * float(light.std())
    generator = torch.Generator().manual_seed(0)
    hours = by_name["drifting"].draw(torch.tensor([0, int(BLOCKS_A_DAY / 2) + 1]), generator) // 100
    assert hours.tolist() == [[0] * 4, [12] * 4]
    assert len(rows) > int(by_name["independent"].rows.max())


def test_a_window_is_suspicious_where_the_library_s_estimates_are_beyond_a_threshold(made):
    reference, rows, drawn_laws, _, _ = made
    stream = Streams(reference, drawn_laws[0], rows, 2)
    stream.take()
    sums = drawn_laws[0].sums(stream.kept[0].reshape(-1, 4))
    shaped = [each.view(LANES, WINDOW - 1, -1) for each in (sums.linear.double(), sums.squares.double(), sums.products)]
    # One block more makes a window: the first again.
    shaped = [torch.cat((each, each[:, :1]), 1) for each in shaped]
    window = replace(sums, linear=shaped[0], squares=shaped[1], products=shaped[2])
    runs = torch.cat((stream.kept[0], stream.kept[0][:, :1]), 1)
    index = drawn_laws[0].rows_of(runs[0]).flatten()
    values = window_statistics(reference, rows[index], None)[len(reference.bands) :]
    ratio = math.exp(float(values[1])) * reference.participation_ratio
    tail = float(values[NAMED.index("tail_shift")])
    usual = stream.limit
    assert not beyond(reference, usual, window, variances(window)).any()
    for name, inside, outside in (
        ("participation_ratio", ratio / 1.03, ratio / 1.01),
        ("tail_shift", tail + 1e-5, tail - 1e-5),
        ("mean_shift_ratio", float(values[4]) ** 2 + 1e-6, float(values[4]) ** 2 - 1e-6),
        ("head_energy_ratio_low", math.exp(float(values[0])) - 1e-5, math.exp(float(values[0])) + 1e-5),
        ("total_variance", reference.total_variance / 2, reference.total_variance * 2),
    ):
        for value, found in ((inside, False), (outside, True)):
            flags = beyond(reference, usual | {name: value}, window, variances(window))
            assert bool(flags[0, 0]) == found, (name, value)


def test_what_is_not_healthy_pages(made):
    reference, rows, _, labels, light = made
    shrunk = unit(reference.mean.float() + 0.4 * (rows - reference.mean.float()))
    stream = Streams(reference, laws(reference, shrunk, labels, light, 240, 0)[0], shrunk, 1)
    stream.take()
    assert stream.tally.pages == LANES
    assert stream.tally.sequential > LANES * STEPS / 2
    assert stream.tally.window == LANES * (STEPS - WINDOW + 1)


def test_bounds_of_a_share_are_exact():
    assert binomial_bounds(0, 1_000_000)[1] == pytest.approx(1 - 0.05 ** (1 / 1_000_000))
    low, high = binomial_bounds(2, 10)
    assert (low, high) == pytest.approx((0.02521, 0.55610), abs=1e-5)
