"""The report is one file that needs no other, names its runs, and refuses what is no run."""

import base64
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from training.report import CURVES, ReportError, RunLog, page


def part(rank: float) -> dict[str, Any]:
    ranks = [1, 2, 4, 8, 16]
    return {
        "dimension": 16,
        "effective_rank": rank,
        "rankme": rank + 1,
        "participation_ratio": rank / 2,
        "std_ratio": 0.8,
        "total_variance": 0.5,
        "ranks": ranks,
        "eigenvalues": [2.0 ** (-i * 4 / rank) for i in ranks[:-1]] + [0.0],
    }


def write_run(folder: Path, epochs: int = 3, **extra: object) -> Path:
    folder.mkdir()
    with (folder / "log.jsonl").open("w") as file:
        for epoch in range(1, epochs + 1):
            record = {"epoch": epoch, "loss": 2 / epoch, "knn": 0.5, "learning_rate": 0.1, "seconds": 60.0}
            record |= {"views_per_second": 1234, "representation": part(8.0 - epoch), "projection": part(4.0)} | extra
            file.write(json.dumps(record) + "\n")
    return folder


def drawings(made: str) -> list[ElementTree.Element]:
    """The pictures of a light page; each has a twin for a dark one."""
    return [
        ElementTree.fromstring(base64.b64decode(it))
        for it in re.findall(r"src='data:image/svg\+xml;base64,([^']+)", made)
    ]


def test_a_report_is_one_file_with_every_curve_and_spectrum(tmp_path: Path) -> None:
    guarded = write_run(tmp_path / "guarded", guard="collapse: <rank>")
    plain = write_run(tmp_path / "plain", epochs=1, predictor_alignment=[0.5, 1.0])
    (plain / "encoder").mkdir()
    (plain / "encoder" / "encoder.json").write_text(json.dumps({"quality": {"knn": 0.8403}}))
    made = page([guarded, plain])
    assert not re.findall(r"(?:src|href|srcset)='?(?!'?data:)[^'>]*", made), "a page that loads something else"
    figures = drawings(made)
    assert len(figures) == len(CURVES) + 2 + 2 * 2  # curves, last spectra, and two pictures a run
    axes = [part for figure in figures for part in figure.iter() if re.fullmatch(r"axes_\d+", part.get("id", ""))]
    assert len(axes) == len(CURVES) + 2 + 4 * 2  # a picture over the epochs has a scale of colours
    assert made.count("<source media='(prefers-color-scheme: dark)'") == len(figures)
    assert "guarded" in made
    assert "collapse: &lt;rank&gt;" in made
    assert "5.0 of 16" in made
    assert "84.03%" in made  # a finished run brings its test accuracy


def test_an_encoder_beside_its_log_brings_its_test_accuracy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "shipped")
    (folder / "encoder.json").write_text(json.dumps({"quality": {"knn": 0.8403}}))
    assert "84.03%" in page([folder])


def test_series_skip_the_records_without_the_value(tmp_path: Path) -> None:
    run = RunLog.read(write_run(tmp_path / "run"))
    assert run.series(lambda r: r["loss"] if r["epoch"] != 2 else None) == ([1, 3], [2.0, 2 / 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"", "is empty"),
        (b"{}\n", "line 1: not a record"),
        (b"{\n", "line 1: not a record"),
        (b"\xff\xfe\n", "line 1: not a record"),
        (b'{"epoch": 1, "representation": {"eigenvalues": [1]}}\n', r"line 1: not a record of a run \(KeyError"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ReportError, match=message) as error:
        page([tmp_path])
    assert str(tmp_path) in str(error.value)
