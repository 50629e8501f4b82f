"""The claim tables: at the defaults, at other seeds, and at parameters away from the defaults."""

from typing import Any

import pytest
import torch

from theory import NAMES
from theory.lab import find

QUICK = ("measurement", "eigenspace-alignment")
ELSEWHERE: dict[str, list[dict[str, Any]]] = {
    "measurement": [
        {"dimension": 40, "samples": 30, "shift": 1.0, "loud": 12.0, "dead": 5, "decay": 1.0},
        {"dimension": 128, "samples": 2000, "scale": 1e-5, "loud": 500.0, "dead": 90},
    ],
    "strong-augmentation": [
        {"amplitude": 1.0, "dimension": 24, "noisy": 6, "variance": 2.0},
        {"amplitude": 3.0, "dimension": 12, "noisy": 9, "variance": 0.5},
    ],
    "implicit-regularization": [{"depth": 3, "dimension": 24}, {"depth": 2, "noise": 0.05, "dimension": 12}],
    "projector": [{"kept": 4, "dimension": 24}, {"kept": 20, "dimension": 28, "noise": 0.1}],
    "noncontrastive-dynamics": [
        {"weight_decay": 0.1, "augmentation": 0.5, "predictor_rate": 3.0},
        {"weight_decay": 0.3, "augmentation": 0.1, "dimension": 8, "strongest": 2.0},
    ],
    "eigenspace-alignment": [
        {"weight_decay": 0.02, "predictor_rate": 3.0},
        {"augmentation": 0.6, "dimension": 10, "strongest": 0.5},
    ],
    "directpred": [{"epsilon": 0.3, "frequency": 20}, {"weight_decay": 0.08, "augmentation": 0.6, "epsilon": 0.2}],
    "frustration": [
        {"frustrated": 0.2, "classes": 4},
        {"frustrated": 0.05, "head_rate": 15.0, "samples": 100, "dimension": 24},
    ],
    "barlow-twins": [{"penalty": 0.02, "amplitude": 2.0}, {"dimension": 12, "noisy": 4, "depth": 3}],
}


def failures(name: str, **values: Any) -> list[str]:
    torch.set_num_threads(1)
    lab = find(name)
    found = lab.run(lab.parameters(**values))
    assert found.panels
    return [f"{c.statement}: {c.expectation}, seen {c.observed:.6g}" for c in found.claims if c.verdict == "fails"]


@pytest.mark.parametrize("name", QUICK)
def test_claims_hold_at_the_defaults(name: str) -> None:
    assert failures(name) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_claims_of_the_longer_labs_hold_at_the_defaults(name: str) -> None:
    assert failures(name) == []


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_claims_hold_at_other_seeds(name: str, seed: int) -> None:
    assert failures(name, seed=seed) == []


@pytest.mark.soak
@pytest.mark.parametrize(("name", "values"), [(name, values) for name in NAMES for values in ELSEWHERE[name]])
def test_claims_hold_away_from_the_defaults(name: str, values: dict[str, Any]) -> None:
    assert failures(name, **values) == []
