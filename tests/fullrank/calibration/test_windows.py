"""Windows measured all at once against each window measured alone, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fullrank import Reference
from fullrank.calibration import resample
from fullrank.calibration.inputs import InputReference
from fullrank.calibration.ranges import LEAST_TAIL_SHIFT, NAMED, Calibration
from fullrank.calibration.resample import Traffic, calibrated
from fullrank.calibration.windows import Pool, scatter
from fullrank.descriptors import width
from fullrank.rows import unit
from fullrank.sample import measure_sample, thinned
from fullrank.verdict import thresholds
from tests.support.windows import window_statistics

D, CLASSES = 32, 5


def drawn(n, seed, kinds=0):
    """Rows (n, d), their classes and descriptors. So many kinds of classes lie apart along every direction, as far as
    rows of one class do; without, five lie apart along the first four."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    scale = torch.arange(1, D + 1).float() ** -0.5
    centres = torch.randn(kinds or CLASSES, D, generator=fixed) * (scale if kinds else torch.arange(D) < 4)
    labels = torch.randint(len(centres), (n,), generator=generator)
    rows = centres[labels] + torch.randn(n, D, generator=generator) * scale + 0.5
    return rows, labels, centres[labels][:, :6] + torch.randn(n, 6, generator=generator)


def as_of_images(inputs, seed=8):
    """Descriptors as wide as those of grey images, a thumbnail's and a texture's, mixed from the six."""
    mixing = torch.randn(6, width(1), generator=torch.Generator().manual_seed(seed))
    return inputs @ mixing + torch.randn(len(inputs), width(1), generator=torch.Generator().manual_seed(seed + 1))


@pytest.fixture(scope="module")
def known():
    """A reference that knows its inputs, the unit rows that gave it, their classes and descriptors."""
    rows, labels, inputs = drawn(1500, 2)
    made = Reference.build(drawn(1500, 1)[0], rows, calibrate=False)
    inputs = as_of_images(inputs)
    return replace(made, inputs=InputReference.build(inputs)), unit(rows), labels, inputs


@pytest.mark.parametrize("law", ["independent", "sessions", "narrow"])
def test_all_windows_at_once_read_as_each_alone(known, law):
    reference, rows, labels, inputs = known
    traffic = Traffic(labels, 3)
    draw = torch.stack([getattr(traffic, law)(1024, at) for at in range(3)])
    other = torch.stack([traffic.independent(2048) for _ in range(2)])
    together = torch.cat(Pool(reference, rows, inputs).statistics([draw, other]))
    alone = torch.stack([window_statistics(reference, rows[index], inputs[index]) for index in (*draw, *other)])
    assert bool(alone[:, -1].isfinite().all())
    first = len(reference.bands)
    ranks = [first + NAMED.index(name) for name in ("effective_rank", "numerical_rank", "input_correlation")]
    assert together[:, ranks].isinf().all()
    tail = first + NAMED.index("tail_shift")
    # The rows that gave the mean have no error towards it; new ones have, which is taken off.
    alone[:, tail] += 1 / reference.rows
    rest = [i for i in range(together.shape[1]) if i not in ranks]
    np.testing.assert_allclose(together[:, rest], alone[:, rest], rtol=2e-4, atol=2e-5)


def test_how_a_window_follows_its_inputs_is_what_a_monitor_reads_of_it(known):
    reference, rows, labels, of_classes = known
    inputs = 4 * rows[:, :6] + 0.1 * torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(9))
    made = calibrated(reference, rows, labels, inputs, windows=8, blocks=8, seed=3)
    window = Traffic(labels, 5).independent(1024)
    seen = Pool(made, rows, inputs).input_correlation(window)
    assert made.inputs is not None
    few = thinned(window, 512)
    expected = measure_sample(rows[few], inputs[few], made.inputs.reach).input_correlation
    assert seen == pytest.approx(expected.estimate, abs=1e-5)
    usual = made.calibration.range("input_correlation", 1024)
    assert usual.low < seen < usual.high
    assert 0.03 < thresholds(made, 1024)["input_correlation"] <= (usual.low + usual.high) / 4
    assert thresholds(made, 1024)["input_correlation"] < usual.narrow_low
    # Inputs that say nothing of the rows, or nothing but their class, and a reference without any, give no threshold.
    blind, rough = (
        calibrated(reference, rows, labels, it, windows=8, blocks=8, seed=3) for it in (inputs.roll(1, 0), of_classes)
    )
    for none in (blind, rough, calibrated(replace(reference, inputs=None), rows, labels, windows=8, blocks=8, seed=3)):
        assert math.isnan(thresholds(none, 1024)["input_correlation"])
    old = made.tensors()
    for name in ("centre", "spread", "low", "high"):
        old[f"calibration.{name}"] = old[f"calibration.{name}"][:, :-2].contiguous()
    assert math.isnan(thresholds(Reference.from_tensors(old), 1024)["input_correlation"])


def test_the_ranks_of_a_window_are_those_of_its_rows(known):
    reference, rows, labels, inputs = known
    pool = Pool(reference, rows, inputs)
    window = Traffic(labels, 4).independent(2048)
    values = window_statistics(reference, rows[window], inputs[window])[len(reference.bands) :]
    rank = math.exp(float(values[NAMED.index("effective_rank")])) * reference.effective_rank
    assert pool.effective_rank(window) == pytest.approx(rank, rel=1e-4)
    few = torch.arange(400)
    wide = torch.randn(900, 500, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 501) ** -1.0
    made = Reference.build(wide, wide, calibrate=False)
    seen = math.log(Pool(made, unit(wide), None).effective_rank(few) / made.effective_rank)
    expected = float(window_statistics(made, unit(wide)[few], None)[len(made.bands) + NAMED.index("effective_rank")])
    assert seen == pytest.approx(expected, abs=1e-4)
    assert pool.numerical_rank(window) == float(values[NAMED.index("numerical_rank")]) * reference.numerical_rank
    # Twenty rows, however often they come, cannot say how many of 32 directions are silent.
    assert math.isnan(pool.numerical_rank(torch.arange(20).repeat(60)))
    silent = rows.clone() - reference.mean.float()
    silent = silent - silent @ reference.basis[:, 8:].float() @ reference.basis[:, 8:].float().T
    assert Pool(reference, silent + reference.mean.float(), None).numerical_rank(window) == 8


def test_the_scatter_in_panels_is_the_product():
    rows = torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scatter(rows), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_of_many_rows_so_many_are_drawn_from(known, monkeypatch):
    reference, rows, labels, inputs = known
    whole = thresholds(calibrated(reference, rows, labels, inputs, windows=6, blocks=30))
    monkeypatch.setattr(resample, "MOST_ROWS", 1200)
    part = thresholds(calibrated(reference, rows, labels, inputs, windows=6, blocks=30))
    assert part != whole
    for name in ("participation_ratio", "head_energy_ratio_low", "tail_energy_ratio_high", "input_distance"):
        assert part[name] == pytest.approx(whole[name], rel=0.25)


@pytest.mark.parametrize(("kinds", "usual"), [(0, True), (60, False)])
def test_the_shift_in_the_tail_is_calibrated_on_the_encoder_s_own_traffic(kinds, usual):
    """Where classes differ along every direction, sessions of one class move the mean along them all."""
    rows, labels, _ = drawn(3000, 2, kinds)
    made = Reference.build(drawn(3000, 1, kinds)[0], rows, calibrate=False)
    known = calibrated(made, rows, labels, windows=12, blocks=20)
    limit = thresholds(known, 1024)["tail_shift"]
    assert (limit < 1.5 * LEAST_TAIL_SHIFT) == usual
    fresh, labels, _ = drawn(3000, 3, kinds)
    traffic = Traffic(labels, 5)
    column = NAMED.index("tail_shift") - len(NAMED)
    seen = [
        float(window_statistics(known, unit(fresh)[law(1024, 0)], None)[column])
        for law in traffic.laws()
        for _ in range(8)
    ]
    assert max(seen) < limit
    assert (max(seen) < LEAST_TAIL_SHIFT) == usual


def test_an_older_calibration_has_the_general_threshold_of_the_shift_in_the_tail(known):
    reference, rows, labels, inputs = known
    made = calibrated(reference, rows, labels, inputs, windows=3, blocks=10)
    tensors = made.tensors()
    for name in ("centre", "spread", "low", "high"):
        tensors[f"calibration.{name}"] = tensors[f"calibration.{name}"][:, :-3].contiguous()
    older = Reference.from_tensors(tensors)
    assert isinstance(older.calibration, Calibration)
    assert thresholds(older, 1024)["tail_shift"] == LEAST_TAIL_SHIFT
    unknown = dict.fromkeys(("input_correlation", "texture_shift"), math.nan)
    same = thresholds(made, 1024) | {"tail_shift": LEAST_TAIL_SHIFT} | unknown
    np.testing.assert_equal(thresholds(older, 1024), same)
