"""Builds a self-contained HTML page on training runs: a comparison, curves, and spectra over the epochs."""

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from models.report.figures import picture
from models.report.page import render

PARTS = ("representation", "projection")
NEEDED = ("epoch", "loss", "knn", "learning_rate", "seconds", "views_per_second")
OF_A_PART = ("dimension", "effective_rank", "rankme", "participation_ratio", "std_ratio", "ranks", "eigenvalues")
DECADES = 6
"""Eigenvalues below the largest by more than this many powers of ten share the darkest colour."""


PICTURE = (
    "Each column is an epoch, each row a rank on a logarithmic scale, the largest eigenvalue at the bottom; the colour"
    " is the eigenvalue over that epoch's largest. A collapse is a dark band that grows downwards from the top."
)


class ReportError(ValueError):
    """Raised for a folder that holds no run, or a log that cannot be read. The message names it."""


@dataclass(frozen=True)
class RunLog:
    """The log of a run: one record an epoch, and the finished encoder's card ({} until there is one)."""

    name: str
    records: list[dict[str, Any]]
    card: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RunLog":
        """Read a run's folder. Raises ReportError if it has no readable log."""
        log = folder / "log.jsonl"
        if not log.is_file():
            raise ReportError(f"{log} is missing: {folder} is no run's folder, or its first epoch is not over")
        records = []
        for number, text in enumerate(log.read_text(errors="replace").splitlines(), 1):
            try:
                record = json.loads(text)
                [record[key] for key in NEEDED], [record[part][key] for part in PARTS for key in OF_A_PART]
            except (ValueError, KeyError, TypeError) as error:
                raise ReportError(f"{log}, line {number}: not a record of a run ({error!r})") from error
            records.append(record)
        if not records:
            raise ReportError(f"{log} is empty: the run's first epoch is not over")
        places = folder / "encoder" / "encoder.json", folder / "encoder.json"  # a run's; an encoder's beside its log
        card: dict[str, Any] = next((json.loads(place.read_text()) for place in places if place.is_file()), {})
        return cls(folder.name, records, card)

    def series(self, value: Callable[[dict[str, Any]], Any]) -> tuple[list[int], list[float]]:
        """The epochs and values of all records that have the value."""
        points = [(record["epoch"], found) for record in self.records if (found := value(record)) is not None]
        return [epoch for epoch, _ in points], [float(found) for _, found in points]


CURVES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "loss": lambda r: r["loss"],
    "kNN accuracy, held-out images": lambda r: r["knn"],
    "effective rank, representation": lambda r: r["representation"]["effective_rank"],
    "effective rank, projection": lambda r: r["projection"]["effective_rank"],
    "RankMe, representation": lambda r: r["representation"]["rankme"],
    "participation ratio, representation": lambda r: r["representation"]["participation_ratio"],
    "std x sqrt(d), representation": lambda r: r["representation"]["std_ratio"],
    "std x sqrt(d), projection": lambda r: r["projection"]["std_ratio"],
    "learning rate": lambda r: r["learning_rate"],
    "predictor's alignment with its input's eigenspace": lambda r: (
        fmean(r["predictor_alignment"]) if r.get("predictor_alignment") else None
    ),
}


def page(folders: Sequence[Path], command: str = "") -> str:
    """The page on the runs in `folders`, as HTML. Raises ReportError for a folder without a run, and FiguresError
    without matplotlib."""
    runs = [RunLog.read(folder) for folder in folders]
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    return render(title, parts=sections(runs), command=command)


def sections(runs: Sequence[RunLog]) -> list[Markup]:
    """The parts of a page on runs: their last epochs side by side, warnings, curves and spectra."""
    parts = [
        _table(runs),
        *(
            f"<p class='verdict bad'><b>{html.escape(run.name)}</b>{html.escape(text)}</p>"
            for run in runs
            for text in _warnings(run)
        ),
        "<h2>Curves</h2>",
        _curves(runs),
        "<h2>Spectra after the last epoch</h2>",
        _last_spectra(runs),
        "<h2>Spectra over the epochs</h2>",
        f"<p class='soft'>{PICTURE}</p>",
        *(_spectrum_picture(run) for run in runs),
    ]
    return [Markup(it) for it in parts]


def _warnings(run: RunLog) -> list[str]:
    """The guard's first and last warnings."""
    said = [record["guard"] for record in run.records if record.get("guard")]
    return [said[0], said[-1]] if len(said) > 1 else said


def _table(runs: Sequence[RunLog]) -> str:
    """The runs side by side: the last epoch's values, and the finished encoder's on the test set."""
    head = ["run", "epochs", "loss", "kNN, held out", "kNN, test", "effective rank", "RankMe", "participation ratio"]
    head += ["std x sqrt(d)", "projection's rank", "views/s", "hours"]
    rows = []
    for run in runs:
        last = run.records[-1]
        quality = run.card.get("quality", {})
        h, z = (last[part] for part in PARTS)
        cells = [html.escape(run.name), last["epoch"], f"{last['loss']:.4g}"]
        cells.append("" if last["knn"] is None else f"{last['knn']:.2%}")
        cells += [f"{quality['knn']:.2%}" if "knn" in quality else "", f"{h['effective_rank']:.1f} of {h['dimension']}"]
        cells += [f"{h['rankme']:.1f}", f"{h['participation_ratio']:.1f}", f"{h['std_ratio']:.2f}"]
        cells += [f"{z['effective_rank']:.1f} of {z['dimension']}", f"{last['views_per_second']:,}"]
        cells.append(f"{sum(record['seconds'] for record in run.records) / 3600:.2f}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        "<div class='scroll card'><table><tr>"
        + "".join(f"<th>{name}</th>" for name in head)
        + "</tr>"
        + "".join(rows)
        + "</table></div>"
    )


def _curves(runs: Sequence[RunLog]) -> str:
    present = {name: value for name, value in CURVES.items() if any(run.series(value)[1] for run in runs)}
    return _side_by_side(_curve(name, value, runs) for name, value in present.items())


def _curve(name: str, value: Callable[[dict[str, Any]], Any], runs: Sequence[RunLog]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for run in runs:
            epochs, values = run.series(value)
            axes.plot(epochs, values, label=run.name, marker="." if len(epochs) < 30 else "")
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(runs) > 1:
            axes.legend(fontsize=8)

    return picture(draw, f"{name} by epoch")


def _last_spectra(runs: Sequence[RunLog]) -> str:
    return _side_by_side(_last_spectrum(part, runs) for part in PARTS)


def _last_spectrum(part: str, runs: Sequence[RunLog]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for run in runs:
            spectrum = run.records[-1][part]
            values = np.maximum(spectrum["eigenvalues"], 1e-12)
            axes.loglog(spectrum["ranks"], values, marker=".", label=run.name)
        axes.set(title=f"eigenvalues of the covariance, {part}", xlabel="rank")
        axes.legend(fontsize=8)

    return picture(draw, f"Eigenvalues of the {part} after the last epoch")


def _spectrum_picture(run: RunLog) -> str:
    return _side_by_side(_waterfall(run, part) for part in PARTS)


def _waterfall(run: RunLog, part: str) -> str:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        ranks = np.array(run.records[0][part]["ranks"], float)
        values = np.array([record[part]["eigenvalues"] for record in run.records], float).T
        shares = np.log10(np.maximum(values / np.maximum(values.max(axis=0), 1e-30), 10.0**-DECADES))
        epochs = np.array([record["epoch"] for record in run.records], float)
        edges = np.sqrt(np.concatenate([ranks[:1], ranks]) * np.concatenate([ranks, ranks[-1:]]))
        edges[0], edges[-1] = ranks[0] * 0.8, ranks[-1] * 1.1
        mesh = axes.pcolormesh(
            np.append(epochs - 0.5, epochs[-1] + 0.5), edges, shares, vmin=-DECADES, vmax=0, rasterized=True
        )
        axes.set(yscale="log", title=f"{run.name}: {part}", xlabel="epoch", ylabel="rank")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(mesh, ax=axes, label="log10 of the share of the largest")

    return picture(draw, f"Spectrum of the {part} of {run.name} over the epochs")


def _side_by_side(pictures: Iterable[str]) -> str:
    return f"<div class='figures'>{''.join(pictures)}</div>"
