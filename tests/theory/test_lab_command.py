"""`fullrank lab`: flags, exit codes, JSON, files, and the committed pages."""

import json
import sys
from pathlib import Path

import pytest

from theory import measurement
from theory.command import main
from theory.lab import NAMES, ParameterError, find
from theory.pages import body, claims, page

DOCS = Path(__file__).parents[2] / "docs" / "theory"


def test_list_names_every_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_parameter_and_one_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    lab = find(name)
    assert f"example: fullrank lab {name} {lab.example}" in printed
    assert "--seed" in printed


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_accepted(name: str) -> None:
    lab = find(name)
    words = lab.example.split()
    values = {
        flag[2:].replace("-", "_"): json.loads(value) for flag, value in zip(words[::2], words[1::2], strict=True)
    }
    assert lab.parameters(**values) != lab.parameters()


def test_a_lab_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measurement", "--samples", "300", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["lab"] == "measurement"
    assert printed["holds"] is True
    assert printed["parameters"]["samples"] == 300
    assert {"statement", "formula", "relation", "predicted", "observed", "tolerance", "holds"} == set(
        printed["claims"][0]
    )
    stored = json.loads((tmp_path / "measurement.json").read_text())
    assert stored["claims"] == printed["claims"]
    assert stored["panels"][0]["lines"][0]["x"]
    assert (tmp_path / "measurement.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_predicted_beside_observed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measurement", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "predicted" in printed
    assert "holds" in printed


def test_a_failing_claim_is_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measurement, "covariance", lambda z: z.mT @ z / z.shape[-2])
    assert main(["measurement", "--out", str(tmp_path)]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_divergence_is_exit_1_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dimension", "8", "--kept", "2", "--batch", "16", "--rate", "1e9", "--json", "--out", str(tmp_path)]
    assert main(["projector", *flags]) == 1
    assert "no longer finite" in json.loads(capsys.readouterr().out)["diverged"]


def test_without_matplotlib_the_claims_are_there_and_the_message_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["measurement", "--out", str(tmp_path)]) == 0
    assert "pip install 'fullrank[lab]'" in capsys.readouterr().out
    assert (tmp_path / "measurement.json").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no-such-lab"], "there is no lab"),
        (["strong-augmentation", "--amplitude", "-1"], "amplitude must be at least 0"),
        (["strong-augmentation", "--noisy", "16"], "noisy must be below dimension"),
        (["implicit-regularization", "--depth", "0"], "depth must be at least 1"),
        (["implicit-regularization", "--depth", "2.5"], "invalid int value"),
        (["frustration", "--frustrated", "1.5"], "frustrated must be at least 0 and at most 1"),
        (["frustration", "--dimension", "5"], "dimension must be at least classes + 2"),
        (["noncontrastive-dynamics", "--dimension", "1"], "dimension must be at least 2"),
        (["noncontrastive-dynamics", "--augmentation", "nan"], "augmentation must be at least 0"),
        (["directpred", "--weight-decay", "0.5"], "all modes die"),
        (["directpred", "--step", "0"], "step must be above 0"),
        (["barlow-twins", "--batch", "40"], "at least 4 per dimension"),
        (["projector", "--kept", "32"], "kept must be below dimension"),
        (["measurement", "--rows", "200"], "rows must be at least 16 times dimension"),
        (["measurement", "--no-such-flag", "1"], "unrecognized arguments"),
        (["eigenspace-alignment", "--run", "no-such-file"], "cannot be read"),
        (["all", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_bad_parameters_are_exit_2_before_anything_runs(
    argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_a_number_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ParameterError, match="dimension must be an integer, not True"):
        measurement.Parameters(dimension=True)


def test_a_run_log_is_read_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1, "loss": 2.0}\n')
    assert main(["eigenspace-alignment", "--run", str(log)]) == 2
    assert "predictor_alignment" in capsys.readouterr().err
    log.write_text('{"epoch": 1, "predictor_alignment": [0.2, 0.3]}\n{"epoch": 2, "predictor_alignment": [0.5, 0.4]}\n')
    assert main(["eigenspace-alignment", "--run", str(log), "--dimension", "4", "--json", "--out", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)["claims"][-1]
    assert found["observed"] == pytest.approx(0.45)
    assert found["holds"] is False


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
    lab = find("measurement")
    result = lab.run(lab.parameters())
    text = page(lab, result)
    assert claims(result) in text
    assert text.count("\n| ") > len(result.claims)
