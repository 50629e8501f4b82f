"""Where a claim ends: the rates and times that bound its domain, and parameters at which one once failed falsely."""

import math
from typing import Any

import pytest
import torch

from theory import frustration, noncontrastive_dynamics
from theory.lab import find
from theory.toys import F64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_mode_at_the_threshold_never_dies_and_above_it_takes_its_time() -> None:
    at = torch.tensor([0.0, 1.5], dtype=F64)  # 1 + σ² = 2.5 = 1/(4η)
    assert noncontrastive_dynamics.time_to_die(at, 0.1) == math.inf
    assert noncontrastive_dynamics.time_to_die(torch.tensor([0.0, 1.0], dtype=F64), 0.1) == 0
    above = torch.tensor([0.0, 3.0], dtype=F64)
    assert noncontrastive_dynamics.time_to_die(above, 0.1) == pytest.approx(2 * math.pi * math.sqrt(4 / 0.0375))


def test_a_time_step_follows_the_fastest_mode() -> None:
    eye = torch.eye(3, dtype=F64)
    flat = torch.full((3,), 0.25, dtype=F64)
    model = noncontrastive_dynamics.Model(flat, 0.04, 3.0)
    assert noncontrastive_dynamics.longest_step(model, 2 * eye, eye) == pytest.approx(1 / (1.25 * 12 + 0.04))
    assert noncontrastive_dynamics.longest_step(model, 0 * eye, 2 * eye) == pytest.approx(1 / (1.25 * 4 + 0.04))
    slow = noncontrastive_dynamics.Model(flat, 0.04, 3.0, target=50.0)
    assert noncontrastive_dynamics.longest_step(slow, 0 * eye, 2 * eye) == pytest.approx(1 / 50.04)


def test_the_students_rate_is_that_of_its_flow() -> None:
    given = frustration.Parameters(samples=40, classes=3, frustrated=0.3, seed=1)
    a = frustration.assignment(given, 0.3, "pair")
    inputs = frustration.teacher_inputs(given, a, given.generator())[:, :10]
    n = len(inputs)
    u = torch.cat([inputs.T @ inputs / n, -inputs.T @ a / n], 1)
    y = torch.cat([-(a.T @ inputs) / a.sum(0)[:, None], torch.eye(3, dtype=F64)], 1)
    rates = torch.linalg.eigvals(torch.cat([u, y])).real.sort().values
    assert frustration.student_rate(a, inputs) == pytest.approx(float(rates[rates > 1e-9][0]), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("frustration", {"seed": 895, "samples": 100, "classes": 2, "frustrated": 0.5621221056996786}),
        ("frustration", {"seed": 855, "samples": 100, "classes": 2, "dimension": 9, "frustrated": 0.8732}),
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
