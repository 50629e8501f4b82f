"""Where a claim ends: the rates and times that bound its domain, and parameters at which one once failed falsely."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from theory import directpred, label_graph, linear_byol, noncontrastive_dynamics, projector
from theory.lab import find
from theory.toys import F64, normal, runge_kutta


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_mode_at_the_threshold_never_dies_and_above_it_takes_its_time() -> None:
    at = torch.tensor([0.0, 1.5], dtype=F64)  # 1 + σ² = 2.5 = 1/(4η)
    assert linear_byol.time_to_die(at, 0.1) == math.inf
    assert linear_byol.time_to_die(torch.tensor([0.0, 1.0], dtype=F64), 0.1) == 0
    for noise in (1.6, 3.0):
        spread = torch.tensor([0.0, noise], dtype=F64)
        gain, bound = 1 + noise, linear_byol.time_to_die(spread, 0.1)
        taken = clock(lambda p, g=gain: p * (p - 0.1 - g * p * p), 1.0, 1 / (2 * gain))
        assert bound / 4 < taken < bound


def clock(slope: Callable[[float], float], start: float, end: float) -> float:
    """The time from `start` to `end` under ṗ = slope(p): the trapezoidal rule over ln p."""
    log_p = torch.linspace(math.log(start), math.log(end), 20_001, dtype=F64)
    return float(torch.trapezoid(torch.tensor([p / slope(p) for p in log_p.exp().tolist()], dtype=F64), log_p))


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.4), (0.9, 0.8), (0.03, 0.001)])
def test_a_balanced_mode_passes_in_the_time_of_its_law(start: float, end: float) -> None:
    taken = clock(lambda p: p * (p - 0.04 - 1.25 * p * p), start, end)
    assert linear_byol.passage(start, end, 0.25, 0.04) == pytest.approx(taken, rel=1e-6)


def test_an_imbalance_is_left_by_a_thousandth_after_its_time() -> None:
    """One mode off the balanced curve, where p relaxes (0.108) hardly faster than the imbalance falls (0.08)."""
    noise, eta = 3.19340773, 0.04
    high, gain = linear_byol.fixed_points(noise, eta)[1], 1 + noise
    start = [torch.tensor(high**2 * 11, dtype=F64), torch.tensor(high, dtype=F64)]
    until = linear_byol.time_to_balance(10.0, noise, eta)

    def mode(now: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        s, p = now
        moves = s * (1 - gain * p)
        return [2 * p * moves - 2 * eta * s, moves - eta * p]

    state, steps = start, 2000
    for _ in range(steps):
        state = runge_kutta(mode, state, until / steps)
    left = abs(float(state[0]) / high**2 - 1)
    assert 1e-5 < left < 1e-3


@pytest.mark.parametrize(
    ("held", "memory", "settles"), [(0.1, 0.3, True), (2.5, 0.0, True), (3.5, 0.0, False), (6.0, 0.5, True)]
)
def test_a_held_predictor_settles_where_its_map_contracts(held: float, memory: float, settles: bool) -> None:
    """The radius against the eigenvalues, and against DirectPred's own map of one mode at p₊ = 0.758."""
    rate = 0.6775
    kept = np.array([[memory, 1 - memory], [-held * rate * memory, 1 - held * rate * (1 - memory)]])
    radius = directpred.radius(held, memory, rate)
    assert radius == pytest.approx(abs(np.linalg.eigvals(kept)).max(), rel=1e-12)
    high = linear_byol.fixed_points(0.25, 0.04)[1]
    log_s = log_f = 2 * math.log(high) + 1e-3
    for _ in range(400):
        log_f = math.log(memory * math.exp(log_f) + (1 - memory) * math.exp(log_s))
        p = math.exp(log_f / 2)
        log_s += 2 * held * (p - 0.04 - 1.25 * p * p)
    assert (abs(log_s - 2 * math.log(high)) < 1e-4) is settles is (radius < 1)


def test_a_time_step_follows_the_fastest_mode() -> None:
    eye = torch.eye(3, dtype=F64)
    flat = torch.full((3,), 0.25, dtype=F64)
    model = linear_byol.Model(flat, 0.04, 3.0)
    assert linear_byol.longest_step(model, 2 * eye, eye) == pytest.approx(1 / (1.25 * 12 + 0.04))
    assert linear_byol.longest_step(model, 0 * eye, 2 * eye) == pytest.approx(1 / (1.25 * 4 + 0.04))
    slow = linear_byol.Model(flat, 0.04, 3.0, target=50.0)
    assert linear_byol.longest_step(slow, 0 * eye, 2 * eye) == pytest.approx(1 / 50.04)


def test_the_students_rate_is_that_of_its_flow() -> None:
    a = label_graph.assignment(40, 3, 0.3, "pair")
    inputs = label_graph.teacher_inputs(a, torch.Generator().manual_seed(1))[:, :10]
    n = len(inputs)
    u = torch.cat([inputs.T @ inputs / n, -inputs.T @ a / n], 1)
    y = torch.cat([-(a.T @ inputs) / a.sum(0)[:, None], torch.eye(3, dtype=F64)], 1)
    rates = torch.linalg.eigvals(torch.cat([u, y])).real.sort().values
    assert label_graph.student_rate(a, inputs) == pytest.approx(float(rates[rates > 1e-9][0]), rel=1e-8)


def test_two_labels_in_one_place_of_the_slowest_mode_do_not_contract_at_its_rate() -> None:
    chain = torch.tensor([[9.0, 1, 0, 0], [1, 9, 1, 1], [0, 1, 9, 0], [0, 1, 0, 9]], dtype=F64)  # three ends alike
    a = chain / chain.sum(1, keepdim=True)
    assert label_graph.other_modes(a, 50.0) < 1e-5  # the ends' two modes are one rate, and the slowest
    pair = torch.tensor([[9.0, 1, 0, 0], [1, 9, 0.1, 0], [0, 0.1, 9, 1], [0, 0, 1, 9]], dtype=F64)
    apart = pair / pair.sum(1, keepdim=True)
    assert label_graph.other_modes(apart, 0.0) > 1  # two twos: within one the slowest mode hardly differs


@pytest.mark.parametrize("rate", [3.0, 1e300])
def test_no_rate_of_the_projector_leads_beyond_the_edge_of_stability(rate: float) -> None:
    given = projector.Parameters(dimension=8, kept=3, batch=24, noise=0.5, steps=100, rate=rate)
    assert [claim.statement for claim in projector.run(given).claims if claim.verdict == "fails"] == []


def test_a_step_is_at_most_one_over_the_curvature() -> None:
    given = projector.Parameters(dimension=8, kept=3, batch=24, noise=0.5)
    x, pair = normal(given.generator(), 2, 24, 8)
    network = projector.start(given)
    w = network.w.requires_grad_()
    value = projector.loss(given, network(x), network(pair))
    (slope,) = torch.autograd.grad(value, w, create_graph=True)
    (bent,) = torch.autograd.grad(0.5 * slope.square().sum(), w)
    curvature = float((bent * slope).sum() / slope.square().sum())  # gᵀHg/|g|²
    plain = projector.Network(w.detach(), network.a, network.b)
    moved, length = projector.stepped(given, plain, [slope.detach()], (x, pair, float(value)), 8 / curvature)
    assert length in [2.0**-n * 8 / curvature for n in range(2, 6)]
    assert float(projector.loss(given, moved(x), moved(pair))) < float(value)
    assert torch.equal(moved.a, plain.a)


def test_no_mode_that_dies_in_time_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a `strongest` of 20,000, where all modes above the threshold are waited for in vain."""
    monkeypatch.setattr(noncontrastive_dynamics, "LONGEST", 1.0)
    claims = noncontrastive_dynamics.survivors(noncontrastive_dynamics.Parameters(dimension=4, weight_decay=0.09))
    assert {claim.verdict for claim in claims} == {"outside"}


@pytest.mark.parametrize("balance", [-1.0, -0.1, 0.0, 0.1, 0.8])
def test_a_twin_head_lets_no_output_fall_slower_than_its_law(balance: float) -> None:
    rate, time, start = 0.04, 192.0, 1 - balance
    state = [torch.tensor(1.0, dtype=F64), torch.tensor(start, dtype=F64)]
    for _ in range(2000):
        state = runge_kutta(lambda now: [-2 * rate * now[0] * now[1]] * 2, state, time / 2000)
    left = float((state[0] * state[1] / start).sqrt())
    assert left < label_graph.twin_head(rate, time)
    assert label_graph.twin_head(0.0, time) == 1
    if balance == 0:
        assert left == pytest.approx(1 / (1 + 2 * rate * time), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("frustration", {"seed": 895, "samples": 100, "classes": 2, "frustrated": 0.5621221056996786}),
        (
            "frustration",
            {"seed": 206, "samples": 21, "classes": 4, "dimension": 8, "frustrated": 0.2496, "step": 0.0639},
        ),
        ("frustration", {"seed": 993, "samples": 40, "classes": 2, "dimension": 4, "frustrated": 0.0}),
        (
            "frustration",
            {"seed": 181, "samples": 53, "classes": 3, "frustrated": 0.07, "head_rate": 4.8785, "step": 0.10938819},
        ),
        ("frustration", {"seed": 855, "samples": 100, "classes": 2, "dimension": 9, "frustrated": 0.8732}),
        ("directpred", {"seed": 569, "weight_decay": 0.00136, "epsilon": 0.006, "memory": 0.138, "step": 0.2165}),
        ("directpred", {"seed": 42, "augmentation": 0.0, "weight_decay": 0.128, "epsilon": 0.02, "memory": 0.0}),
        ("noncontrastive-dynamics", {"seed": 857, "dimension": 13, "augmentation": 2.0936, "weight_decay": 0.0989}),
        (
            "noncontrastive-dynamics",
            {"seed": 544, "dimension": 19, "augmentation": 1.4566, "predictor_rate": 0.13955, "target_rate": 1.1453},
        ),
        ("eigenspace-alignment", {"seed": 193, "dimension": 2, "augmentation": 0.0, "strongest": 0.21}),
        ("eigenspace-alignment", {"seed": 243, "weight_decay": 0.01848, "predictor_rate": 0.13209, "step": 0.1957}),
        (
            "projector",
            {"seed": 747, "dimension": 20, "kept": 10, "noise": 0.065176, "batch": 22, "rate": 0.14, "steps": 100},
        ),
        (
            "strong-augmentation",
            {
                "seed": 55,
                "amplitude": 8.12307035,
                "variance": 0.72953165,
                "batch": 80,
                "rate": 0.10633381,
                "steps": 324,
            },
        ),
    ],
)
def test_no_claim_fails_where_one_did(name: str, values: dict[str, Any]) -> None:
    lab = find(name)
    result = lab.run(lab.parameters(**values))
    assert [claim.statement for claim in result.claims if claim.verdict == "fails"] == []
    assert sum(claim.verdict == "holds" for claim in result.claims) > len(result.claims) / 2


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        # One row's noise makes the noisy block nearly singular in a single step.
        (
            "strong-augmentation",
            {"seed": 628, "amplitude": 0.0, "variance": 3.0763045, "batch": 12, "rate": 0.12042975, "steps": 982},
            "one row's noise",
        ),
        # Long steps make the first layer ten times as large as the second.
        (
            "implicit-regularization",
            {"seed": 385, "depth": 3, "dimension": 12, "batch": 12, "rate": 4.393846419176439, "steps": 445},
            "of |W₂ᵀW₂|",
        ),
        # The first step is all of the training.
        (
            "implicit-regularization",
            {"seed": 538, "depth": 1, "batch": 10, "rate": 5.491204891178336, "steps": 516},
            "no gradient flow",
        ),
        (
            "implicit-regularization",
            {"seed": 856, "depth": 2, "noise": 0.007423827, "rate": 5.041253594781185, "steps": 326},
            "no gradient flow",
        ),
        # What was learned drowns in the rounding of what was there before.
        ("projector", {"dimension": 8, "kept": 3, "rate": 1e-12, "steps": 50}, "its rounding shows"),
        # Five dimensions: whether one dies is chance.
        (
            "implicit-regularization",
            {"seed": 918, "depth": 2, "dimension": 5, "rate": 0.7737522327341663, "steps": 377},
            "matter of chance",
        ),
    ],
)
def test_a_claim_ends_where_its_mechanism_does(name: str, values: dict[str, Any], reason: str) -> None:
    lab = find(name)
    claims = lab.run(lab.parameters(**values)).claims
    assert [claim.statement for claim in claims if claim.verdict == "fails"] == []
    # What was seen contradicts a claim that its reason takes back: without the domain this run would fail.
    assert any(reason in claim.outside and not claim.holds for claim in claims)
    assert sum(claim.verdict == "holds" for claim in claims) >= len(claims) / 2
