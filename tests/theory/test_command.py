"""`fullrank lab`: flags, exit codes, JSON, files, and the committed pages."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from cli import app
from theory import NAMES, measurement
from theory.lab import ParameterError, find
from tools.lab_pages import body, claims, page

DOCS = Path(__file__).parents[2] / "docs" / "theory"


def lab(*argv: str) -> Any:
    """`fullrank lab ARGV` in a wide terminal."""
    return typer.testing.CliRunner().invoke(app, ["lab", *argv], env={"COLUMNS": "300", "TERM": "dumb"})


def test_list_names_every_lab() -> None:
    result = lab("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_parameter_and_one_example(name: str) -> None:
    result = lab(name, "--help")
    assert result.exit_code == 0
    printed = " ".join(result.stdout.split())
    assert f"Example: fullrank lab {name} {find(name).example}" in printed
    for parameter in find(name).parameters.model_fields:
        assert f"--{parameter.replace('_', '-')} " in printed


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_accepted(name: str) -> None:
    found = find(name)
    words = found.example.split()
    values = {
        flag[2:].replace("-", "_"): json.loads(value) for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    assert found.parameters(**values) != found.parameters()


def test_a_lab_prints_and_writes(tmp_path: Path) -> None:
    result = lab("measurement", "--samples", "300", "--json", "--out", str(tmp_path))
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["lab"] == "measurement"
    assert printed["holds"] is True
    assert printed["parameters"]["samples"] == 300
    assert {
        "statement",
        "formula",
        "relation",
        "predicted",
        "observed",
        "tolerance",
        "outside",
        "holds",
        "verdict",
    } == set(printed["claims"][0])
    stored = json.loads((tmp_path / "measurement.json").read_text())
    assert stored["claims"] == printed["claims"]
    assert stored["panels"][0]["lines"][0]["x"]
    assert (tmp_path / "measurement.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_predicted_beside_observed(tmp_path: Path) -> None:
    result = lab("measurement", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "predicted" in result.stdout
    assert "holds" in result.stdout


def test_a_failing_claim_is_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "covariance", lambda z: z.mT @ z / z.shape[-2])
    result = lab("measurement", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "FAILS" in result.stdout


def test_divergence_is_exit_1_and_named(tmp_path: Path) -> None:
    flags = ["--depth", "1", "--noise", "0.3", "--rate", "20", "--steps", "100", "--json", "--out", str(tmp_path)]
    result = lab("implicit-regularization", *flags)
    assert result.exit_code == 1
    assert "no longer finite" in json.loads(result.stdout)["diverged"]


def test_without_matplotlib_the_claims_are_there_and_the_message_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = lab("measurement", "--out", str(tmp_path))
    assert result.exit_code == 0
    assert "pip install 'fullrank-server[lab]'" in result.stdout
    assert (tmp_path / "measurement.json").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no-such-lab"], "No such command"),
        (["strong-augmentation", "--amplitude", "-1"], "amplitude must be at least 0"),
        (["strong-augmentation", "--noisy", "16"], "noisy must be below dimension"),
        (["strong-augmentation", "--amplitude", "1e308"], "rate must be at most 1.6e-308"),
        (["implicit-regularization", "--depth", "0"], "depth must be at least 1"),
        (["implicit-regularization", "--depth", "2.5"], "valid integer"),
        (["frustration", "--frustrated", "1.5"], "frustrated must be at least 0 and at most 1"),
        (["frustration", "--dimension", "5"], "dimension must be at least classes + 2"),
        (["noncontrastive-dynamics", "--dimension", "1"], "dimension must be at least 2"),
        (["noncontrastive-dynamics", "--augmentation", "nan"], "augmentation must be at least 0"),
        (["directpred", "--weight-decay", "0.5"], "all modes die"),
        (["directpred", "--step", "0"], "step must be above 0"),
        (["barlow-twins", "--batch", "40"], "at least 4 per dimension"),
        (["projector", "--kept", "32"], "kept must be below dimension"),
        (["measurement", "--dead", "64"], "dead must be below dimension"),
        (["measurement", "--no-such-flag", "1"], "No such option"),
        (["eigenspace-alignment", "--run", "no-such-file"], "cannot be read"),
        (["all", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_bad_parameters_are_exit_2_before_anything_runs(argv: list[str], says: str) -> None:
    result = lab(*argv)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


def test_with_few_rows_the_ranks_laws_say_nothing_and_the_exact_ones_hold() -> None:
    claims = measurement.run(measurement.Parameters(rows=128)).claims
    outside = [claim for claim in claims if claim.verdict == "outside"]
    assert {claim.outside for claim in outside} == {
        "rows below 16 per dimension, 1024: terms beyond the first in 1/n are not small"
    }
    assert len(outside) == 9
    assert Counter(claim.verdict for claim in claims) == {"outside": 9, "holds": 8}


def test_a_number_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ParameterError, match="dimension must be an integer, not True"):
        measurement.Parameters(dimension=True)


def test_a_run_log_is_read_and_judged(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1, "loss": 2.0}\n')
    result = lab("eigenspace-alignment", "--run", str(log))
    assert result.exit_code == 2
    assert "predictor_alignment" in result.stderr
    for epoch, verdict, code in ((2, "outside", 0), (50, "fails", 1)):  # a short run is shown, a long one is judged
        lines = [{"epoch": 1, "predictor_alignment": [0.2, 0.3]}, {"epoch": epoch, "predictor_alignment": [0.5, 0.4]}]
        log.write_text("\n".join(map(json.dumps, lines)))
        result = lab("eigenspace-alignment", "--run", str(log), "--dimension", "4", "--json", "--out", str(tmp_path))
        assert result.exit_code == code
        found = json.loads(result.stdout)["claims"][-1]
        assert found["observed"] == pytest.approx(0.45)
        assert found["verdict"] == verdict


@pytest.mark.parametrize("value", ['"high"', "0.5", '[0.5, "high"]', "[null]"])
def test_a_log_without_numbers_is_named(value: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"epoch": 1, "predictor_alignment": {value}}}\n')
    result = lab("eigenspace-alignment", "--run", str(tmp_path / "log.jsonl"))
    assert result.exit_code == 2
    assert "'predictor_alignment' a list of numbers" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "argv",
    [
        ["noncontrastive-dynamics", "--step", "1e-320"],
        ["noncontrastive-dynamics", "--augmentation", "1e308"],
        ["eigenspace-alignment", "--step", "1e-320"],
        ["frustration", "--step", "1e-320"],
        ["measurement", "--shift", "1e308"],
        ["strong-augmentation", "--variance", "1e308"],
    ],
)
def test_what_float64_cannot_hold_is_exit_1_and_named(argv: list[str], tmp_path: Path) -> None:
    result = lab(*argv, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "a number is beyond float64: take parameters nearer to the defaults" in " ".join(result.stdout.split())


def test_the_committed_pages_are_those_of_the_labs() -> None:
    for ending in ("md", "png"):
        assert {path.stem for path in DOCS.glob(f"*.{ending}")} - {"README"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_page_is_its_labs_own(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    for part in body(find(name)):
        assert part in text
    assert f"]({name}.md)" in (DOCS / "README.md").read_text()
    assert (DOCS / f"{name}.png").stat().st_size < 80_000


def test_a_page_has_the_claim_table() -> None:
    found = find("measurement")
    result = found.run(found.parameters())
    text = page(found, result)
    assert claims(result) in text
    assert text.count("\n| ") > len(result.claims)
