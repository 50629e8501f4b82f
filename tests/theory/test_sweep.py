"""Random parameters: whatever a user asks for, no claim fails inside its domain and nothing crashes."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from theory import NAMES
from theory.lab import Diverged, ParameterError, Settings, find

RUNS = 200
# Larger problems, and finer steps, show nothing that these do not, and take minutes a run.
LARGEST = {"dimension": 20, "samples": 100, "rows": 8192, "steps": 1000, "batch": 80, "classes": 5, "depth": 3}
LEAST = {"steps": 300}
FINEST = {"step": 2, "rate": 8}  # how many times below its default


def drawn(parameters: type[Settings], rng: random.Random) -> Settings:
    """Parameters from their domain: each the default, or the largest, 40 % of the time, else log-uniform around it."""
    while True:
        values: dict[str, Any] = {"seed": rng.randrange(1000)}
        for name, entry in parameters.model_fields.items():
            if name == "seed" or entry.annotation is str:
                continue
            if rng.random() < 0.4:
                values[name] = min(entry.default, LARGEST.get(name, entry.default))
                continue
            kinds = ("gt", "ge", "le")
            bounds = {kind: getattr(it, kind) for it in entry.metadata for kind in kinds if hasattr(it, kind)}
            lowest = bounds.get("ge", bounds.get("gt", 0.0)) or entry.default / FINEST.get(name, 30)
            low = max(lowest, LEAST.get(name, 0))
            high = min(bounds.get("le", entry.default * 30), LARGEST.get(name, math.inf))
            value = math.exp(rng.uniform(math.log(low or 1e-9), math.log(max(high, low or 1e-9))))
            if bounds.get("ge") == 0 and rng.random() < 0.1:
                value = 0.0
            values[name] = round(value) if entry.annotation is int else value
        try:
            return parameters(**values)
        except ParameterError:
            continue


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_no_claim_fails_inside_its_domain(name: str) -> None:
    """And most claims are inside: a lab cannot pass by asserting nothing, nor by telling everybody to take less."""
    torch.set_num_threads(1)
    lab, rng = find(name), random.Random(0)
    failures, verdicts, diverged = [], Counter[str](), []
    for _ in range(RUNS):
        given = drawn(lab.parameters, rng)
        try:
            result = lab.run(given)
        except Diverged as error:
            diverged.append(str(error))
            continue
        verdicts.update(claim.verdict for claim in result.claims)
        failed = [claim for claim in result.claims if claim.verdict == "fails"]
        failures += [f"{given}: {c.statement}: {c.expectation}, seen {c.observed:.6g}" for c in failed]
    assert not failures, "\n".join(failures)
    assert verdicts["holds"] > verdicts["outside"]
    assert len(diverged) <= RUNS / 10
    assert all("smaller rate or step" in message for message in diverged)
