"""Verdicts on simulated encoders where the inputs, copies of them or a change over time decide."""

import math
from dataclasses import replace

import pytest
import torch

from fullrank import SpectrumMonitor
from fullrank.calibration.ranges import NAMED
from fullrank.calibration.resample import calibrated
from fullrank.verdict import thresholds
from tests.support.simulated import D, inputs_of, project, watched


@pytest.fixture(scope="module")
def known(world, reference):
    rows = world.rows(4000, 2)
    return calibrated(reference, rows, inputs=inputs_of(rows), windows=6, blocks=60)


def seen(world, known, rows, inputs, canary):
    """What a monitor says of rows and their inputs, beside a canary that is "intact", "turned" or "none"."""
    with SpectrumMonitor(D, known, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.observe(rows, inputs=inputs)
        if canary != "none":
            monitor.record_canary(world.rows(48, 3 if canary == "intact" else 77))
        assert monitor.flush(120)
        return monitor.snapshot()


@pytest.mark.parametrize(
    ("inputs", "canary", "state"),
    [
        ("differ", "intact", "traffic_shifted"),
        ("differ", "none", "dimensional_collapse"),
        ("usual", "intact", "dimensional_collapse"),
        ("differ", "turned", "model_fault"),
    ],
)
def test_few_directions_are_the_traffics_where_inputs_differ_and_the_canary_is_intact(
    world, known, inputs, canary, state
):
    rows, usual = project(world.rows(3000, 24), 8, seed=8), inputs_of(world.rows(3000, 24))
    far = usual + 0.5 * usual.std(0)
    snapshot = seen(world, known, rows, usual if inputs == "usual" else far, canary)
    usually = known.calibration.range("input_distance", 3000)
    assert (usually.high < snapshot.inputs.distance < usually.narrow_high) is (inputs == "differ")
    assert snapshot.verdict.state == state
    # A window's own verdict does not read the canary's rules, but a canary that turned vouches for nothing.
    assert snapshot.window_verdicts[300.0].state == (state if canary != "turned" else "dimensional_collapse")


@pytest.mark.parametrize(
    ("alike", "inputs", "canary", "state"),
    [
        (4, "differ", "intact", "traffic_shifted"),
        (4, "differ", "none", "complete_collapse"),
        (4, "usual", "intact", "complete_collapse"),
        (4, "differ", "turned", "model_fault"),
        (10, "differ", "intact", "complete_collapse"),
    ],
)
def test_rows_near_one_another_are_the_traffics_only_while_some_variance_is_left(
    world, known, alike, inputs, canary, state
):
    rows, usual = world.rows(3000, 24), inputs_of(world.rows(3000, 24))
    near = rows / rows.norm(dim=1, keepdim=True) + alike * known.mean.float()
    far = usual + 0.5 * usual.std(0)
    snapshot = seen(world, known, near, usual if inputs == "usual" else far, canary)
    share = snapshot.windows[300.0].total_variance / known.total_variance
    assert (share < 0.1, share > 0.03) == (True, alike == 4)
    assert snapshot.verdict.state == state, snapshot.verdict


def test_near_copies_of_one_picture_are_narrow_traffic_and_hide_no_collapse(world, known):
    """80 % are one picture with a little noise: all directions shrink, those of the inputs too."""
    healthy, copies = world.rows(3000, 40), world.rows(1, 41) + 0.01 * world.rows(3000, 42)
    mixed = torch.where(torch.rand(3000, 1, generator=torch.Generator().manual_seed(1)) < 0.8, copies, healthy)
    inputs = inputs_of(mixed)
    for broken, state in (
        (mixed, "traffic_narrowed"),
        (project(mixed, 16, basis=known.basis), "dimensional_collapse"),
        (mixed * 1e-4 + 1, "complete_collapse"),
    ):
        (snapshot,) = watched(known, [(broken, inputs, 250.0)])
        assert snapshot.verdict.state == state, snapshot.verdict
    assert watched(known, [(mixed, None, 250.0)])[0].verdict.state == "dimensional_collapse"  # nothing excuses it


@pytest.mark.parametrize(("shift", "state"), [(0.0, "healthy"), (0.4, "model_fault")])
def test_images_that_come_again_excuse_no_shift_along_the_tail_that_is_larger_than_theirs(world, known, shift, state):
    """Rows of 700 images, drawn with replacement: the mean of so many moves by a 700th of the variance. 0.4 deviations
    along each trailing direction, with usual inputs, are the model's."""
    healthy = world.rows(700, 60)[torch.randint(700, (3000,), generator=torch.Generator().manual_seed(2))]
    tail = known.basis[:, 8:].float() @ known.eigenvalues[8:].sqrt().float()
    lengths = healthy.norm(dim=1, keepdim=True)
    (snapshot,) = watched(known, [(healthy + shift * lengths * tail, inputs_of(healthy), 250.0)])
    assert snapshot.windows[300.0].sample.copies_share > 0.3
    assert snapshot.verdict.state == state, snapshot.verdict


def test_one_image_that_comes_often_moves_the_mean_and_is_no_fault_of_the_model(world, known):
    rows, often = world.rows(3000, 61), torch.rand(3000, generator=torch.Generator().manual_seed(3)) < 0.12
    rows[often] = rows[0].clone()
    (snapshot,) = watched(known, [(rows, inputs_of(rows), 250.0)])
    assert snapshot.windows[300.0].tail_shift > snapshot.thresholds["tail_shift"]
    assert snapshot.verdict.state == "traffic_shifted"
    assert "come often" in snapshot.verdict.reason


def test_one_answer_to_different_images_is_the_models_fault_and_one_to_the_same_image_is_not(world, known):
    """Every tenth row is the mean: a fallback. Without inputs nothing tells it from other images."""
    images = world.rows(3000, 62)
    answers = images.clone()
    answers[::10] = known.mean.float() * images.norm(dim=1).mean()
    for inputs, state in ((inputs_of(images), "model_fault"), (None, "traffic_shifted")):
        (snapshot,) = watched(known, [(answers, inputs, 250.0)])
        assert snapshot.verdict.state == state, snapshot.verdict
    (found,) = watched(known, [(answers, inputs_of(images), 250.0)])
    assert found.windows[300.0].sample.shared_answers == pytest.approx(0.1, abs=0.04)
    assert "another image" in found.verdict.reason
    again = images[torch.randint(400, (3000,), generator=torch.Generator().manual_seed(4))]
    (snapshot,) = watched(known, [(again, inputs_of(again), 250.0)])
    assert snapshot.windows[300.0].sample.copies_share > 0.5
    assert snapshot.windows[300.0].sample.shared_answers == 0


def test_answers_handed_to_the_next_request_are_the_models_fault(world, known):
    """Same rows, same inputs: what is lost is only which belongs to which."""
    images = world.rows(3000, 70)
    inputs = inputs_of(images)
    limit = thresholds(known)["input_correlation"]
    half = torch.where(torch.rand(3000, 1, generator=torch.Generator().manual_seed(5)) < 0.6, images.roll(1, 0), images)
    for answers in (images.roll(1, 0), half):
        (found,) = watched(known, [(answers, inputs, 250.0)])
        assert found.verdict.state == "model_fault"
        assert "the answers do not follow their inputs" in found.verdict.reason
        assert found.windows[300.0].sample.input_correlation.upper < limit
        assert "input_correlation" not in found.windows[300.0].unknown
    (well,) = watched(known, [(images, inputs, 250.0)])
    assert well.verdict.state == "healthy"
    assert well.windows[300.0].sample.input_correlation.lower > limit
    # Without inputs, or of inputs of another kind, nothing is known of healthy answers.
    (blind,) = watched(known, [(images.roll(1, 0), None, 250.0)])
    assert blind.verdict.state == "healthy"
    assert "inputs" in blind.windows[300.0].unknown["input_correlation"]
    (other,) = watched(known, [(images.roll(1, 0), inputs + 40, 250.0)])
    assert other.verdict.state == "healthy"
    # Nor in an older reference, which the statistics say.
    columns = {name: getattr(known.calibration, name).clone() for name in ("centre", "spread", "low", "high")}
    for column in columns.values():
        column[:, NAMED.index("input_correlation") - len(NAMED)] = math.nan
    older = replace(known, calibration=replace(known.calibration, **columns))
    (unjudged,) = watched(older, [(images.roll(1, 0), inputs, 250.0)])
    assert unjudged.verdict.state == "healthy"
    assert "calibrate the reference again" in unjudged.windows[300.0].unknown["input_correlation"]


def test_one_picture_alone_is_narrow_traffic_and_a_dead_encoder_is_not(world, known):
    one = world.rows(1, 41) + 1e-4 * world.rows(1000, 42)
    (snapshot,) = watched(known, [(one, inputs_of(one), 100.0)])
    assert snapshot.verdict.state == "traffic_narrowed"
    (snapshot,) = watched(known, [(torch.ones(1000, D), inputs_of(world.rows(1000, 43)), 100.0)])
    assert snapshot.verdict.state == "complete_collapse"


def test_an_earlier_change_hides_no_later_collapse(world, known):
    """Six minutes of good rows, fifteen of one kind of image, then one constant row."""
    good, narrow, point = world.rows(3600, 50), world.rows(9000, 51, [0]), torch.ones(3100, D)
    parts = [(good, None, 360.0), (narrow, None, 900.0), (point, None, 310.0), (point, None, 60.0)]
    well, other, dead, still = watched(known, parts)
    assert [it.verdict.state for it in (well, other)] == ["healthy", "traffic_narrowed"]
    assert (dead.evidence.alarm, dead.evidence.since) == (True, other.evidence.since)  # still the first change
    assert [it.verdict.state for it in (dead, still)] == ["complete_collapse"] * 2
    assert dead.window_verdicts[300.0].state == "complete_collapse"
