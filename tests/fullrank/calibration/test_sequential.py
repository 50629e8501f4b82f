"""The sequential test and the calibration it rests on, on a simulated encoder of known law."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fullrank import Reference, SpectrumMonitor
from fullrank.calibration.inputs import InputReference
from fullrank.calibration.ranges import NAMED, Calibration
from fullrank.calibration.resample import DAY, SESSION, Traffic, calibrated
from fullrank.calibration.sequential import LEVEL, STAKES, Detector
from fullrank.calibration.windows import columns
from fullrank.moments import Moments
from fullrank.verdict import thresholds
from tests.support.windows import window_statistics

D, CLASSES, K = 48, 6, 12


class World:
    """Rows and the descriptors of what they are of: six classes, detail in every direction."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.centres = 1.2 * torch.randn(CLASSES, D, generator=generator) * (torch.arange(D) < 6)
        self.scale = torch.arange(1, D + 1).float() ** -0.5
        self.turn = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        self.looks = torch.randn(CLASSES, K, generator=generator)

    def draw(self, n, seed, labels=None):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (n,), generator=generator) if labels is None else labels
        rows = (self.centres[labels] + torch.randn(n, D, generator=generator) * self.scale + 0.5) @ self.turn
        return rows, labels, self.looks[labels] + torch.randn(n, K, generator=generator)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def reference(world):
    rows, labels, inputs = world.draw(6000, 2)
    bare = Reference.build(world.draw(6000, 1)[0], rows, canary=world.draw(40, 9)[0], calibrate=False)
    return calibrated(bare, rows, labels, inputs, windows=12, blocks=100)


def watch(reference, parts):
    """The monitor's snapshot after healthy rows and then each part, 256 rows at 20 a second."""
    now, states = [0.0], []
    with SpectrumMonitor(D, reference, windows=(300.0,), clock=lambda: now[0]) as monitor:
        for rows, inputs in parts:
            for block, described in zip(rows.split(256), inputs.split(256), strict=True):
                now[0] += len(block) / 20
                monitor.observe(block, inputs=described)
                assert monitor.flush(120)
                states.append(monitor.snapshot())
    return states


def test_an_evalue_is_at_most_one_in_expectation_under_subgaussian_noise(reference):
    detector = Detector(reference)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, len(detector.names), generator=generator, dtype=torch.float64)
    statistics = detector._centre + detector._tolerance + detector._spread * noise
    values = torch.stack([detector.evalues(row).exp() for row in statistics])
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    # At the edge of the tolerance, the worst case of the null: 1 but for the cap; on the other side far below.
    assert (mean[1] < 1 + 4 * error[1]).all()
    assert (mean[1] > 0.5).all()
    assert (mean[0] < 1).all()


def test_wealth_follows_the_definition(reference):
    detector = Detector(reference)
    generator = torch.Generator().manual_seed(1)
    wealth = np.ones((2, len(detector.names)))
    for step in range(30):
        z = torch.randn(len(detector.names), generator=generator, dtype=torch.float64)
        statistics = detector._centre + (0.5 * detector._tolerance + detector._spread * z)
        detector.bet(statistics, float(step))
        for side, sign in enumerate((-1, 1)):
            for j in range(len(detector.names)):
                u = sign * float(statistics[j] - detector._centre[j]) - float(detector._tolerance[j])
                u /= float(detector._spread[j])
                e = sum(math.exp(stake * u - stake**2 / 2) for stake in STAKES) / len(STAKES)
                wealth[side, j] = max(1.0, wealth[side, j]) * min(e, math.exp(math.log(LEVEL) / 3 + 1))
    np.testing.assert_allclose(detector.wealth.exp(), wealth, rtol=1e-9)
    assert detector.evidence.log10 == pytest.approx(math.log10(wealth.mean()))


def test_what_is_unknown_bets_nothing(reference):
    detector = Detector(reference)
    detector.bet(torch.full((len(detector.names),), math.nan, dtype=torch.float64), 0.0)
    assert float(detector.wealth.abs().sum()) == 0


@pytest.mark.parametrize("law", [0, 1, 2])
def test_no_alarm_on_healthy_blocks_that_the_calibration_has_not_seen(world, reference, law):
    rows, labels, _ = world.draw(4000, 50)
    rows = torch.nn.functional.normalize(rows)
    traffic = Traffic(labels, seed=5)
    detector = Detector(reference)
    for step in range(300):
        block = rows[traffic.laws()[law](256, step * 256)]
        energies = ((block - block.mean(0)) @ reference.basis.float()).double().square().sum(0) * (256 / 255)
        detector.add(float(step), 256, energies, block.double().sum(0), 0.0, 0.0)
        assert detector.evidence.log10 < 4


def test_short_blocks_wait_for_each_other(world, reference):
    rows = torch.nn.functional.normalize(world.draw(256, 60)[0])
    whole, halves = Detector(reference), Detector(reference)

    def add(detector, block, start):
        centred = (block - block.mean(0)) @ reference.basis.float()
        n = len(block)
        energies = centred.double().square().sum(0) * (n / (n - 1))
        detector.add(start, n, energies, block.double().sum(0), 0.0, 0.0)

    add(whole, rows, 7.0)
    add(halves, rows[:128], 7.0)
    assert float(halves.wealth.abs().sum()) == 0
    add(halves, rows[128:], 8.0)
    np.testing.assert_allclose(halves.wealth, whole.wealth, atol=1.0)
    assert float(halves._since.nan_to_num(8.0).min()) == 8.0


def test_finds_a_weak_fault_within_a_few_blocks_and_says_since_when(world, reference):
    """10 % of the units dead moves the effective rank by 2 %; a window of 6,000 rows is 24 blocks."""
    rows, _, inputs = world.draw(6144, 70)
    broken, _, same = world.draw(1536, 71)
    broken[:, ::10] = 0
    snapshots = watch(reference, [(rows, inputs), (broken, same)])
    assert all(snapshot.verdict.state in ("healthy", "insufficient_data") for snapshot in snapshots[:24])
    last = snapshots[-1]
    assert last.evidence.alarm
    assert last.evidence.since == pytest.approx(25 * 12.8)
    assert last.verdict.state == "dimensional_collapse"


def test_clears_after_the_fault(world, reference):
    rows, _, inputs = world.draw(2560, 72)
    shrunk = reference.mean.float() + 0.5 * (torch.nn.functional.normalize(rows) - reference.mean.float())
    snapshots = watch(reference, [(rows, inputs), (shrunk, inputs), (rows, inputs), (rows, inputs)])
    assert snapshots[19].verdict.state == "dimensional_collapse"
    assert snapshots[-1].evidence.log10 < math.log10(LEVEL)


def test_the_inputs_tell_the_model_from_the_traffic(world, reference):
    rows, _, inputs = world.draw(2560, 73)
    noise = 0.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    other = 1.5 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2)) + 1
    assert watch(reference, [(rows, inputs)])[-1].verdict.state == "healthy"
    fault = watch(reference, [(rows + noise, inputs)])[-1]
    assert fault.verdict.state == "model_fault"
    assert "the inputs are what they were" in fault.verdict.reason
    assert fault.inputs.distance < fault.thresholds["input_distance"]
    shifted = watch(reference, [(rows + noise, other)])[-1]
    assert shifted.verdict.state == "traffic_shifted"
    assert shifted.inputs.distance > shifted.thresholds["input_distance"]


def test_one_class_only_is_narrow_traffic(world, reference):
    rows, _, inputs = world.draw(2560, 74, torch.full((2560,), 2))
    assert watch(reference, [(rows, inputs)])[-1].verdict.state in ("traffic_narrowed", "traffic_shifted")


def test_a_fresh_canary_vouches_for_the_model(world, reference):
    rows, _, inputs = world.draw(2560, 73)
    noise = 0.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    with SpectrumMonitor(D, reference, windows=(300.0,), clock=lambda: 0.0) as monitor:
        for block, described in zip((rows + noise).split(256), inputs.split(256), strict=True):
            monitor.observe(block, inputs=described)
        monitor.record_canary(world.draw(40, 9)[0])
        assert monitor.flush(120)
        assert monitor.snapshot().verdict.state == "traffic_shifted"


def test_healthy_statistics_stay_within_the_thresholds_on_new_rows(world, reference):
    limit = thresholds(reference, 6144)
    rows, labels, inputs = world.draw(5000, 80)
    rows, traffic = torch.nn.functional.normalize(rows), Traffic(labels, seed=8)
    for law in traffic.laws():
        for at in (0, DAY // 3):
            index = law(6144, at)
            values = dict(
                zip(NAMED, window_statistics(reference, rows[index], inputs[index])[-len(NAMED) :], strict=True)
            )
            assert (
                math.exp(values["participation_ratio"]) * reference.participation_ratio > limit["participation_ratio"]
            )
            assert math.exp(values["head"]) > limit["head_energy_ratio_low"]
            assert values["mean_shift"] ** 2 < limit["mean_shift_ratio"]
            assert values["input_distance"] < limit["input_distance"]


def test_thresholds_widen_where_rows_are_few(reference):
    few, many = thresholds(reference, 512), thresholds(reference, 6144)
    assert few["participation_ratio"] < many["participation_ratio"]
    assert few["mean_shift_ratio"] > many["mean_shift_ratio"]
    assert thresholds(reference, 10**6) == many | {"numerical_rank": many["numerical_rank"]}
    # What narrow traffic does is no fault of the model: its thresholds lie beyond it.
    assert few["participation_ratio_collapse"] < few["participation_ratio"]


def test_columns_of_the_reference_itself_are_zero(reference):
    energies = (reference.basis.T @ torch.diag(reference.eigenvalues) @ reference.basis).diagonal()
    spread = torch.cat([part / len(part) for part in _per_band(reference)])
    values = columns(reference, spread, reference.mean, 10**9)
    np.testing.assert_allclose(values[: len(reference.bands)], 0, atol=1e-9)
    assert float(values[len(reference.bands)]) == pytest.approx(0, abs=1e-9)
    assert len(energies) == D


def _per_band(reference):
    starts = (0, *reference.bands[:-1])
    for energy, start, end in zip(reference.band_energy, starts, reference.bands, strict=True):
        yield torch.full((end - start,), float(energy), dtype=torch.float64)


def test_laws_of_traffic():
    labels = torch.arange(4).repeat(500)
    traffic = Traffic(labels)
    runs = labels[traffic.sessions(3200)].view(-1, SESSION)
    assert (runs == runs[:, :1]).all()
    assert set(labels[traffic.narrow(100, 3)].tolist()) == {3}
    shares = [torch.bincount(labels[traffic.drifting(8000, at)], minlength=4) / 8000 for at in (0, DAY // 2)]
    np.testing.assert_allclose(shares[0], (1 + 0.5 * np.sin(np.arange(4) * np.pi / 2)) / 4, atol=0.02)
    np.testing.assert_allclose(shares[1], (1 - 0.5 * np.sin(np.arange(4) * np.pi / 2)) / 4, atol=0.02)


def test_a_calibrated_reference_survives_safetensors(reference):
    again = Reference.from_tensors(load(save(reference.tensors())))
    assert thresholds(again, 700) == thresholds(reference, 700)
    np.testing.assert_array_equal(again.inputs.basis, reference.inputs.basis)
    bare = replace(reference, calibration=None, inputs=None)
    assert Reference.from_tensors(bare.tensors()).calibration is None
    assert math.isnan(thresholds(bare)["input_distance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration.rows": torch.tensor([256])}, "calibration.rows must be two or more"),
        ({"calibration.spread": torch.zeros(2, 2)}, "calibration.spread is missing"),
        ({"calibration.low": None}, "calibration.low is missing"),
        ({"inputs.basis": torch.zeros(2, 2)}, "inputs.basis is missing"),
        ({"inputs.bands": torch.tensor([1, 2])}, "inputs.bands must rise"),
    ],
)
def test_damaged_tensors_are_refused_by_name(reference, change, message):
    tensors = {name: t for name, t in (reference.tensors() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        Reference.from_tensors(tensors)


def test_bad_arguments_are_named(world, reference):
    rows, labels, inputs = world.draw(1100, 1)
    bare = replace(reference, calibration=None, inputs=None)
    with pytest.raises(ValueError, match="rows: expected at least 1024"):
        calibrated(bare, rows[:500], labels[:500])
    with pytest.raises(ValueError, match="labels: expected shape"):
        calibrated(bare, rows, labels[:5])
    with pytest.raises(ValueError, match="inputs: expected 1100 rows"):
        calibrated(bare, rows, labels, inputs[:7])
    with pytest.raises(ValueError, match="not calibrated"):
        Detector(bare)


def test_without_labels_octants_stand_for_classes(world):
    rows, _, _ = world.draw(2000, 2)
    bare = Reference.build(world.draw(2000, 1)[0], rows, calibrate=False)
    calibration = calibrated(bare, rows, windows=3, blocks=10).calibration
    assert isinstance(calibration, Calibration)
    # Sessions vary more than independent rows do, in the head above all.
    assert float(calibration.spread[0, 0]) > float(calibration.spread[0, 5])


def test_inputs_of_the_same_law_are_near_and_others_far(world):
    known = InputReference.build(world.draw(4000, 1)[2])
    same, other = world.draw(4000, 2)[2], world.draw(4000, 3, torch.zeros(4000, dtype=torch.long))[2]
    assert known.read(Moments(K).add(same)).distance < 0.15
    assert known.read(Moments(K).add(same)).variance_ratio == pytest.approx(1, abs=0.05)
    assert known.read(Moments(K).add(other)).distance > 0.5
    assert math.isnan(known.read(Moments(K + 1).add(torch.zeros(100, K + 1))).distance)
    assert math.isnan(known.read(None).distance)
