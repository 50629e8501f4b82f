"""One statistic, one function: who changes the function changes all who rest on it, in every room."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank import Moments, Reference, SpectrumMonitor, measures, profile
from fullrank.calibration.resample import calibrated
from fullrank.fleet import Figures as FleetFigures
from fullrank.moments import Traces
from fullrank.rows import unit
from fullrank.verdict import thresholds
from models.gate import Figures as GateFigures
from tests.support.windows import window_statistics
from training.evaluate import Spectrum
from training.guard import Geometry

D = 16


def rows_of(n: int, seed: int) -> Tensor:
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return rows * torch.arange(1, D + 1).float() ** -0.3 + 0.1


@pytest.fixture(scope="module")
def reference() -> Reference:
    made = Reference.build(rows_of(2000, 1), rows_of(2000, 2), calibrate=False)
    return calibrated(made, rows_of(2000, 2), inputs=rows_of(2000, 2)[:, :4], windows=3, blocks=10)


def monitored(reference: Reference) -> dict[str, float]:
    with SpectrumMonitor(D, reference, clock=lambda: 0.0) as monitor:
        monitor.observe(rows_of(2048, 3), inputs=rows_of(2048, 3)[:, :4])
        assert monitor.flush(120)
        snapshot = monitor.snapshot()
    window, counters = snapshot.windows[300.0], snapshot.counters
    return {
        "monitor, band": window.bands[-1].ratio.estimate,
        "monitor, head": window.head.estimate,
        "monitor, mean shift": window.mean_shift_ratio,
        "monitor, rank": window.effective_rank,
        "monitor, ratio": window.participation_ratio.estimate,
        "monitor, trace product": counters.trace_product,
        "monitor, frobenius product": counters.frobenius_product,
        "inputs, distance": snapshot.inputs.distance,
        "sequential test": snapshot.evidence.log10,
    }


def everything(reference: Reference) -> dict[str, float]:
    """The same statistics as each room gives them."""
    rows = unit(rows_of(2048, 3))
    bands = len(reference.bands)
    columns = window_statistics(reference, rows, rows[:, :4])
    again = calibrated(reference, rows_of(2000, 2), windows=2, blocks=4).calibration
    assert again is not None
    built = Reference.build(rows_of(500, 1), rows_of(500, 2), calibrate=False)
    gate, fleet = GateFigures.of(rows), FleetFigures.of(Moments(D).add(rows))
    training = Spectrum.of(rows)
    guard = Geometry.of(rows, rows[:, :8]).representation
    return monitored(reference) | {
        "calibration, band": float(columns[bands - 1]),
        "calibration, head": float(columns[bands]),
        "calibration, mean shift": float(columns[bands + 4]),
        "calibration, ratio": float(columns[bands + 1]),
        "calibration, rank": float(columns[bands + 2]),
        "calibration, band of windows": float(again.centre[1, bands - 1]),
        "calibration, head of windows": float(again.centre[1, bands]),
        "calibration, mean shift of windows": float(again.centre[1, bands + 4]),
        "calibration, ratio of windows": float(again.centre[1, bands + 1]),
        "calibration, rank of windows": float(again.centre[1, bands + 2]),
        "calibration, ratio of blocks": float(again.centre[0, bands + 1]),
        "calibration, mean shift of blocks": float(again.centre[0, bands + 4]),
        "reference, band": float(built.band_energy[-1]),
        "reference, rank": built.effective_rank,
        "reference, ratio": built.participation_ratio,
        "threshold, tail": thresholds(reference)["tail_energy_ratio_high"],
        "gate, rank": gate.effective_rank,
        "gate, ratio": gate.participation_ratio,
        "fleet, rank": fleet.effective_rank,
        "fleet, ratio": fleet.participation_ratio,
        "training, rank": training.effective_rank,
        "training, ratio": training.participation_ratio,
        "guard, rank": guard.effective_rank,
        "guard, ratio": guard.participation_ratio,
    }


def patched(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: change(function(*arguments, **options))


RANKS = {f"{room}, rank" for room in ("monitor", "calibration", "reference", "gate", "fleet", "training", "guard")}
RANKS |= {"calibration, rank of windows"}
RATIOS = {name.replace("rank", "ratio") for name in RANKS}


@pytest.mark.parametrize(
    ("name", "change", "users"),
    [
        (
            "energies_of_rows",
            lambda energies: energies * torch.linspace(1, 3, D),
            {"monitor, band", "monitor, head", "calibration, band", "calibration, head", "sequential test"},
        ),
        (
            "energies_of_sums",
            lambda energies: energies * torch.linspace(1, 3, D),
            {
                "monitor, band",
                "monitor, head",
                "calibration, band",
                "calibration, head",
                "calibration, band of windows",
                "calibration, head of windows",
                "sequential test",
            },
        ),
        ("energies_of_covariance", lambda energies: 2 * energies, {"reference, band", "inputs, distance"}),
        (
            "block_products",
            lambda products: (3 * products[0], products[1]),
            {"monitor, trace product", "calibration, ratio of blocks", "sequential test"},
        ),
        (
            "mean_shift",
            lambda shift: shift + 1.0,
            {
                "monitor, mean shift",
                "calibration, mean shift",
                "calibration, mean shift of windows",
                "calibration, mean shift of blocks",
                "inputs, distance",
                "sequential test",
            },
        ),
        (
            "head_bands",
            lambda half: half + 1,
            {"monitor, head", "calibration, head", "calibration, head of windows", "threshold, tail"},
        ),
    ],
)
def test_a_statistic_of_the_profile_moves_all_its_users(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any], users: set[str]
) -> None:
    before = everything(reference)
    monkeypatch.setattr(profile, name, patched(getattr(profile, name), change))
    after = everything(reference)
    assert users <= moved(before, after)


def test_the_spectrum_and_the_participation_ratio_are_one_each(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(reference)
    with monkeypatch.context() as patch:
        patch.setattr(measures, "spectrum", patched(measures.spectrum, lambda values: values**2))
        assert moved(before, everything(reference)) >= RANKS
    original = Traces.participation_ratio.func
    monkeypatch.setattr(Traces, "participation_ratio", property(lambda it: 2 * original(it)))
    assert moved(before, everything(reference)) >= RATIOS


def moved(before: dict[str, float], after: dict[str, float]) -> set[str]:
    assert all(math.isfinite(value) for value in before.values()), before
    return {name for name, value in before.items() if not math.isclose(value, after[name], rel_tol=1e-6)}
