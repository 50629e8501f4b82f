"""The table of the papers' claims: what it says follows from the runs, and its commands start."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks._experiments_cases import EXPERIMENTS, recipe_of
from benchmarks._experiments_claims import EARLY, FAR, NEAR, claims_table
from benchmarks._experiments_slopes import BARLOW, OVER, SIMCLR, slopes
from benchmarks._methods_claims import linear
from benchmarks._methods_configurations import TWINS
from cli import app
from tests.support.training import TINY
from training.methods import build
from training.methods.predictor import LinearPredictor

COMMANDS = [command for each in FAR for command in each.commands]


def record(name: str, seed: int, linear: float, alignments: tuple[float, float] = (0.5, 0.9)) -> dict[str, Any]:
    spectra = {part: {"dead": 3, "total_variance": 0.4} for part in "hz"}
    twin = {"knn": 0.3, "linear": 0.35} | spectra
    epochs = [{"alignment": each} | spectra for each in alignments]
    run = {"experiment": "F", "name": name, "seed": seed, "knn": 0.5, "linear": linear, "epochs": epochs}
    return run | {f"untrained_{kind}": twin for kind in TWINS}


def test_a_claim_is_held_against_its_own_experiment() -> None:
    runs = [record("DirectCLR", seed, 0.66) for seed in range(3)]
    runs += [record("SimCLR, linear projector", seed, 0.6) for seed in range(3)]
    lines = claims_table(runs).splitlines()
    said = "| probe: DirectCLR over a linear projector | Jing | 62.7, 61.1 | F | 66 against 60 (6.0 ± 0.0) | 3 | seen |"
    assert said in lines
    assert sum("| not run: `python -m benchmarks.experiments B` |" in line for line in lines) == 6
    below = [record(it["name"], it["seed"], it["linear"] - 0.4) for it in runs]
    assert "not counted, both below the untrained twin's 35" in claims_table(below)


def batches(simclr: float, barlow: float, scatter: float) -> list[dict[str, Any]]:
    """G's runs of five batches and two rates, with so many points of the probe for each halving."""
    noise = np.random.default_rng(0).normal(0, scatter, 20)
    made = []
    for case, more in zip(EXPERIMENTS["G"].cases, noise, strict=True):
        halvings = 10 - math.log2(case.settings["batch_size"])
        per = simclr if case.name.startswith("SimCLR") else barlow
        offset = 2.0 if case.name.endswith("rate 1.0") else 0.0
        points = 55 + offset + per * halvings + more
        made.append(record(case.name, 0, points / 100) | {"experiment": "G", "knn": 0.5 - 0.01 * halvings})
    return made


def test_the_slope_over_batches_is_that_of_parallel_lines() -> None:
    exact = slopes("G", batches(-1.5, 0.5, 0.0), linear)
    assert {name: round(each.points, 9) for name, each in exact.items()} == {SIMCLR: -1.5, BARLOW: 0.5, OVER: 2.0}
    assert max(each.error for each in exact.values()) == pytest.approx(0, abs=1e-9)
    runs = batches(-1.5, 0.5, 1.0)
    found = slopes("G", runs, linear)[SIMCLR]
    mine = [it for it in runs if it["name"].startswith(SIMCLR)]
    halvings = np.repeat([4.0, 3.0, 2.0, 1.0, 0.0], 2)
    values = np.array([100 * it["linear"] for it in mine])
    # With places that are the same at both rates the lines' heights drop out: a regression of what is left on places.
    left = values - np.where(np.arange(10) % 2, values[1::2].mean(), values[::2].mean())
    centred = halvings - halvings.mean()
    points = float(centred @ left / (centred @ centred))
    residuals = left - points * centred
    error = math.sqrt(float(residuals @ residuals) / 7 / float(centred @ centred))
    assert (found.points, found.error, found.runs) == (pytest.approx(points), pytest.approx(error), 10)
    assert found.chance == pytest.approx(1.8 / math.sqrt(float(centred @ centred)))


@pytest.mark.parametrize(
    ("simclr", "barlow", "verdict"),
    [(-1.5, 0.5, "seen"), (0.5, -1.5, "**not seen**"), (-1.5, -1.2, "**unclear**, chance alone makes 0.8")],
)
def test_a_slope_counts_only_beyond_chance(simclr: float, barlow: float, verdict: str) -> None:
    said = next(line for line in claims_table(batches(simclr, barlow, 0.0)).splitlines() if "each halving" in line)
    assert said.endswith(f"({barlow - simclr:.1f} ± 0.0) | 1 | {verdict} |")
    assert "not run" in next(line for line in claims_table([]).splitlines() if "each halving" in line)
    few = [it for it in batches(simclr, barlow, 0.0) if "rate 0.5" in it["name"]][:8]
    assert slopes("G", few, linear) == {}
    assert slopes("B", batches(simclr, barlow, 0.0), linear) == {}


def test_the_alignment_is_compared_with_that_of_the_first_epoch() -> None:
    run = record("BYOL, linear predictor", 0, 0.5) | {"experiment": "E"}
    assert "| E | 0.9 against 0.5 | 1 | seen |" in claims_table([run])


def test_claims_are_about_cases_that_are_run() -> None:
    for letter, _, claim in NEAR:
        known = {case.name for case in EXPERIMENTS[letter].cases} | set(TWINS.values())
        assert {side.removesuffix(EARLY) for side in (claim.first, claim.second)} <= known, claim.says


def test_the_controls_of_d_differ_in_the_predictor_alone() -> None:
    cases = {case.name: recipe_of(EXPERIMENTS["D"], case, 0) for case in EXPERIMENTS["D"].cases}
    trained, set_by_hand = cases["DirectPred, predictor trained"], cases["DirectPred, as released"]
    assert (
        trained.augmentation == set_by_hand.augmentation == cases["BYOL, two layers, DirectPred's views"].augmentation
    )
    assert trained.augmentation != cases["BYOL, linear predictor"].augmentation
    method = build(trained.method, TINY.build(), trained.options)
    predictor = method.predictor
    assert isinstance(predictor, LinearPredictor)
    drawn = predictor.weight.clone()
    method.step(0.0)
    assert predictor.weight.equal(drawn)
    assert predictor.weight.requires_grad
    other = build(set_by_hand.method, TINY.build(), set_by_hand.options)
    assert [it.shape for it in method.projector.parameters()] == [it.shape for it in other.projector.parameters()]


def words_of(command: str) -> list[str]:
    """The command's words behind `fullrank`, for the device that this machine has."""
    program, *words = shlex.split(re.sub(r"^torchrun --nproc-per-node 8 \$\(which fullrank\)", "fullrank", command))
    assert program == "fullrank"
    assert words[-2:] == ["--device", "cuda"]
    return words[:-2]


@pytest.mark.parametrize("command", [it for it in COMMANDS if " train " in it])
def test_a_command_for_a_gpu_starts(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[Any] = []
    monkeypatch.setattr("training.loop.train", lambda *given: started.append(given))
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, words_of(command))
    assert ended.exit_code == 0, ended.output
    ((chosen, _),) = started
    options = {key: value for key, value in chosen.options.items() if key not in ("d0", "hidden", "projection")}
    build(chosen.method, TINY.build(), options)


@pytest.mark.parametrize("command", [it for it in COMMANDS if " train " not in it])
def test_a_command_that_measures_is_understood(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, words_of(command))
    assert ended.exit_code == 1, ended.output  # 2 is a word that it does not know
    assert "RUN" in ended.output
