"""The table of the papers' claims: what it says follows from the runs, and its commands start."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks._experiments_cases import EXPERIMENTS, recipe_of
from benchmarks._experiments_claims import EARLY, FAR, NEAR, claims_table
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
