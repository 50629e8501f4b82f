"""Verdicts on the rows of simulated encoders: their faults and their traffic."""

import math
from dataclasses import replace

import pytest
import torch

from fullrank import Reference, SpectrumMonitor
from fullrank.calibration.inputs import InputReading
from fullrank.calibration.resample import calibrated
from fullrank.reading import CONDITIONS, READERS
from fullrank.verdict import RULES, SIGNALS, STATES, diagnose, thresholds
from tests.support.simulated import D, project, verdict, watched


def test_healthy(world, reference):
    assert verdict(reference, world.rows(3000, 10)).state == "healthy"


@pytest.mark.parametrize("n", [520, 1000])
def test_few_rows_do_not_alarm(world, reference, n):
    assert verdict(reference, world.rows(n, 11)).state == "healthy"


@pytest.mark.parametrize("classes", [[0], [1], [7]])
def test_one_class_only_is_narrow_traffic(world, reference, classes):
    assert verdict(reference, world.rows(3000, 12, classes)).state == "traffic_narrowed"


@pytest.mark.parametrize("k", [8, 16, 32])
def test_a_principal_projection_is_dimensional_collapse(world, reference, k):
    assert verdict(reference, project(world.rows(3000, 13), k, basis=reference.basis)).state == "dimensional_collapse"


@pytest.mark.parametrize("k", [8, 16, 32])
def test_a_random_projection_is_dimensional_collapse_though_it_lifts_the_tail(world, reference, k):
    assert verdict(reference, project(world.rows(3000, 14), k, seed=k)).state == "dimensional_collapse"


def test_half_of_the_units_dead_is_dimensional_collapse(world, reference):
    rows = world.rows(3000, 15)
    rows[:, ::2] = 0
    result = verdict(reference, rows)
    assert result.state == "dimensional_collapse"
    assert "32" in result.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_collapse_shows_through_the_rounding_of_a_short_dtype(world, dtype):
    name = str(dtype).removeprefix("torch.")
    served = [world.rows(8000, seed).to(dtype).float() for seed in (1, 2)]
    reference = Reference.build(*served, dtype=name, calibrate=False)
    rows = project(world.rows(3000, 16), 16, seed=9).to(dtype).float()
    assert verdict(reference, rows).state == "dimensional_collapse"
    assert verdict(reference, world.rows(3000, 17).to(dtype).float()).state == "healthy"


def test_drowned_in_the_mean_is_complete_collapse(world, reference):
    rows = world.rows(3000, 18)
    assert verdict(reference, rows * 0.02 + 3 * world.basis[0]).state == "complete_collapse"
    assert verdict(reference, torch.ones(3000, D)).state == "complete_collapse"


def test_a_lifted_tail_is_shifted_traffic(world, reference):
    generator = torch.Generator().manual_seed(4)
    foreign = (world.rows(3000, 19) @ world.basis.T + torch.randn(3000, D, generator=generator) * 0.5) @ world.basis
    assert verdict(reference, foreign).state == "traffic_shifted"


def test_a_canary_that_moved_is_a_model_fault_whatever_the_traffic(world, reference):
    bad = world.rows(48, 77)
    assert verdict(reference, world.rows(3000, 20), bad).state == "model_fault"
    assert verdict(reference, world.rows(10, 20), bad).state == "model_fault"
    assert verdict(reference, world.rows(3000, 20), world.rows(48, 3)).state == "healthy"


def test_a_canary_in_bfloat16_is_no_fault(world, reference):
    assert verdict(reference, world.rows(3000, 21), world.rows(48, 3).bfloat16()).state == "healthy"


@pytest.mark.parametrize("n", [0, 1, 100, 255])
def test_too_few_rows_say_nothing(world, reference, n):
    result = verdict(reference, world.rows(n, 22))
    assert result.state == "insufficient_data"
    assert f"{n} rows" in result.reason


def test_a_collapse_is_blamed_on_inputs_beyond_any_one_kind_of_healthy_ones(world, reference):
    inputs = world.rows(4000, 2)[:, :8]
    known = calibrated(reference, world.rows(4000, 2), inputs=inputs, windows=4, blocks=20)
    narrow = known.calibration.range("input_distance", 3000).narrow_high
    with SpectrumMonitor(D, known, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.observe(project(world.rows(3000, 24), 8, seed=8))
        assert monitor.flush(120)
        windows = monitor.snapshot().windows

    def state(distance):
        return diagnose(windows, known, None, {300.0: InputReading(distance, 1.0)}).state

    assert [state(d) for d in (0.0, narrow, math.nan)] == ["dimensional_collapse"] * 3
    assert state(1.3 * narrow) == "traffic_shifted"


@pytest.mark.parametrize(("apart", "limit"), [(4.0, 1.0), (24.0, 2.4), (50.0, 3.0), (math.nan, 1.0)])
def test_a_canary_image_may_turn_a_tenth_of_the_way_to_its_nearest(reference, apart, limit):
    """Of a canary of pairs that lie so many degrees apart, each pair in a plane of its own."""
    pairs = torch.zeros(D, D)
    for i in range(0, D, 2):
        pairs[i, i] = 1.0
        pairs[i + 1, i] = math.cos(math.radians(apart))
        pairs[i + 1, i + 1] = math.sin(math.radians(apart))
    canary = None if math.isnan(apart) else pairs
    known = replace(reference, canary=canary)
    assert thresholds(known)["canary_angle"] == pytest.approx(limit, abs=1e-3)
    noisy = replace(known, canary_noise=2.0)
    assert thresholds(noisy)["canary_angle"] == pytest.approx(6.0)
    if canary is not None:
        turned = (1.0 + 0.1 * apart, 0.2) if apart < 30 else (3.3, 2.7)
        for degrees, state in zip(turned, ("model_fault", "insufficient_data"), strict=True):
            aside = canary.roll(2, 1)  # at a right angle to each
            moved = math.cos(math.radians(degrees)) * canary + math.sin(math.radians(degrees)) * aside
            with SpectrumMonitor(D, replace(known, canary_participation_ratio=0.0), clock=lambda: 0.0) as monitor:
                monitor.record_canary(moved)
                assert monitor.flush(60)
                assert monitor.snapshot().verdict.state == state


def test_each_window_has_its_own_verdict(world, reference):
    low = project(world.rows(9000, 60), 16, basis=reference.basis)
    well = world.rows(1500, 61)
    before, after = watched(reference, [(low, None, 1200.0), (well, None, 320.0)])
    assert {s: it.state for s, it in before.window_verdicts.items()} == dict.fromkeys(
        (300.0, 3600.0), "dimensional_collapse"
    )
    assert after.window_verdicts[300.0].state == after.verdict.state == "healthy"
    assert after.window_verdicts[3600.0].state == "dimensional_collapse"


def test_every_rule_names_what_exists():
    for rule in RULES:
        assert rule.signal in READERS
        assert rule.threshold in SIGNALS
        assert rule.window in {"canary", "rows", "rows, twice"}
        assert (rule.side in {"below", "above"}, rule.reading in {"bound", "estimate"}) == (True, True)
        for case in rule.cases:
            assert case.when in CONDITIONS
            assert case.state in STATES
        assert rule.state in STATES
    assert set(CONDITIONS) == {case.when for rule in RULES for case in rule.cases}
    assert set(READERS) == {rule.signal for rule in RULES}


def test_a_collapse_too_small_to_matter_is_no_alarm(world, reference):
    # One direction of 64 gone: significant at any n, and not an effect to page on.
    assert verdict(reference, project(world.rows(5000, 23), 63, basis=reference.basis)).state == "healthy"


def test_thresholds_are_in_the_gauges_unit(reference):
    limit = thresholds(reference)
    assert tuple(limit) == SIGNALS
    assert limit["participation_ratio"] == pytest.approx(0.7 * reference.participation_ratio)
    assert limit["total_variance"] == pytest.approx(0.1 * reference.total_variance)
    unknown = {
        "mean_shift_ratio",
        "input_distance",
        "evidence",
        "input_correlation",
        "texture_shift",
    }  # without a calibration
    assert {signal for signal, value in limit.items() if math.isnan(value)} == unknown
    bare = thresholds(None)
    assert set(bare) == set(SIGNALS)
    assert math.isnan(bare["participation_ratio"])
    assert len(set(STATES)) == 7


def test_the_same_rows_again_and_again_are_no_collapse_of_the_model(world, reference):
    """Without keys: 40 images cannot span 64 directions, whatever the model. Where it collapsed as well, they span far
    fewer than 40."""
    index = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(0))
    few = world.rows(40, 30)
    result = verdict(reference, few[index])
    assert result.state == "traffic_narrowed", result
    assert ", 40 of " in result.reason
    noise = torch.randn(3000, D, generator=torch.Generator().manual_seed(1))
    assert verdict(reference, few[index] * (1 + 1e-7 * noise)).state == "traffic_narrowed"
    frame = world.basis[:, :4]
    assert verdict(reference, few[index] @ frame @ frame.T).state == "dimensional_collapse"
    assert verdict(reference, world.rows(3000, 31) @ frame @ frame.T).state == "dimensional_collapse"


def test_a_mean_that_moves_in_the_tail_is_found_and_one_that_moves_with_the_mix_is_not(world, reference):
    rows = torch.nn.functional.normalize(world.rows(3000, 40))
    scale = reference.eigenvalues.sqrt().float()
    tail = torch.zeros(D)
    tail[D // 4 :] = 0.12 * scale[D // 4 :]
    result = verdict(reference, rows + reference.basis.float() @ tail)
    assert result.state == "traffic_shifted", result
    assert "trailing direction" in result.reason
    assert verdict(reference, rows).state == "healthy"


def test_without_calibration_few_directions_are_not_called_alive():
    generator = torch.Generator().manual_seed(0)
    healthy = torch.randn(3000, 128, generator=generator) * torch.arange(1, 129) ** -0.3
    reference = Reference.build(healthy, calibrate=False)
    eight = torch.randn(3000, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    with SpectrumMonitor(128, reference, clock=lambda: 0.0) as monitor:
        monitor.observe(eight + 0.02 * torch.randn(3000, 128, generator=generator))
        assert monitor.flush(60)
        verdict = monitor.snapshot().verdict
    assert verdict.state == "dimensional_collapse"
    assert "is not calibrated" in verdict.reason
