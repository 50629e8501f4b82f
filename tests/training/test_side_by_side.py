"""Steps a second of a run: what the command says of wrong input, and that a failed process ends the others."""

import sys

import pytest

from benchmarks import training_steps
from training.data import SAMPLE

SMALL = ("fashion-simclr", "--data", SAMPLE, "--width", 8, "--batch-size", 32, "--seconds", 0.1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["training_steps", *map(str, arguments)])
    training_steps.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fashion-simclrr",), "did you mean fashion-simclr"),
        (("fashion-simclr", "--data", "nowhere"), "train-images-idx3-ubyte[.gz] is missing"),
        ((*SMALL, "--device", "abacus"), "--device abacus"),
        ((*SMALL, "--batch-size", 751), "--batch-size: 751 is more than the 750 images"),
        ((*SMALL, "--processes", 0), "--processes: 0 must be above 0"),
    ],
)
def test_wrong_input_is_a_sentence(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_a_process_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="a process failed: "):
        run(monkeypatch, *SMALL, "--processes", 2, "--device", "meta")  # there, and computes nothing


def test_it_prints_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, *SMALL)
    cells = [float(cell) for cell in capsys.readouterr().out.splitlines()[-1].strip("| ").split("|")]
    processes, steps, views, cpu, _ = cells
    assert processes == 1
    assert cpu > 0
    assert views == pytest.approx(2 * 32 * steps, rel=0.2)  # steps are rounded to a tenth
