"""Verdicts on simulated encoders: a class mixture mapped into d dimensions, its faults and its traffic."""

import math
from dataclasses import replace

import pytest
import torch

from fullrank import Reference, SpectrumMonitor
from fullrank.calibration.inputs import InputReading
from fullrank.calibration.ranges import NAMED
from fullrank.calibration.resample import calibrated
from fullrank.verdict import CONDITIONS, READERS, RULES, SIGNALS, STATES, diagnose, thresholds

D, CLASSES = 64, 10


class World:
    """Rows of a healthy encoder: ten classes along the leading directions, detail along all."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.basis = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
        self.centres = torch.zeros(CLASSES, D)
        self.centres[:, :9] = 1.5 * torch.randn(CLASSES, 9, generator=generator)
        self.scale = torch.arange(1, D + 1).float() ** -0.5

    def rows(self, n, seed, classes=range(CLASSES)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.tensor(list(classes))[torch.randint(len(classes), (n,), generator=generator)]
        return (self.centres[labels] + torch.randn(n, D, generator=generator) * self.scale + 0.5) @ self.basis


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def reference(world):
    return Reference.build(world.rows(8000, 1), world.rows(8000, 2), canary=world.rows(48, 3), calibrate=False)


def verdict(reference, rows, canary=None):
    with SpectrumMonitor(D, reference, clock=lambda: 0.0) as monitor:
        monitor.observe(rows)
        if canary is not None:
            monitor.record_canary(canary)
        assert monitor.flush(20)
        return monitor.snapshot().verdict


def project(rows, k, seed=None, basis=None):
    if basis is None:
        basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed))).Q
    frame = basis[:, :k].float()
    return rows @ frame @ frame.T


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
    with SpectrumMonitor(D, known, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.observe(rows, inputs=usual if inputs == "usual" else far)
        if canary != "none":
            monitor.record_canary(world.rows(48, 3 if canary == "intact" else 77))
        assert monitor.flush(120)
        snapshot = monitor.snapshot()
    usually = known.calibration.range("input_distance", 3000)
    assert (usually.high < snapshot.inputs.distance < usually.narrow_high) is (inputs == "differ")
    assert snapshot.verdict.state == state
    # A window's own verdict does not read the canary's rules, but a canary that turned vouches for nothing.
    assert snapshot.window_verdicts[300.0].state == (state if canary != "turned" else "dimensional_collapse")


def watched(reference, parts, seconds=0.0):
    """The snapshots after each part, (rows, inputs, seconds that they take), of one monitor."""
    now = [0.0]
    snapshots = []
    with SpectrumMonitor(D, reference, clock=lambda: now[0]) as monitor:
        for rows, inputs, length in parts:
            for i, part in enumerate(rows.split(64)):
                now[0] += length * len(part) / len(rows)
                monitor.observe(part, inputs=None if inputs is None else inputs[64 * i : 64 * i + 64])
            assert monitor.flush(120)
            snapshots.append(monitor.snapshot())
    return snapshots


@pytest.fixture(scope="module")
def known(world, reference):
    rows = world.rows(4000, 2)
    return calibrated(reference, rows, inputs=inputs_of(rows), windows=6, blocks=60)


def inputs_of(rows):
    """Descriptors that the encoder would map to the rows."""
    return rows[:, :12] * 2 + 1


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
