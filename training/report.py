"""Writes a self-contained HTML page on training runs: a comparison, curves, and spectra over the epochs."""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

PARTS = ("representation", "projection")
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
        for number, text in enumerate(log.read_text().splitlines(), 1):
            try:
                record = json.loads(text)
                record["representation"]["eigenvalues"], record["epoch"]
            except (ValueError, KeyError, TypeError) as error:
                raise ReportError(f"{log}, line {number}: not a record of a run ({error!r})") from error
            records.append(record)
        if not records:
            raise ReportError(f"{log} is empty: the run's first epoch is not over")
        card = folder / "encoder" / "encoder.json"
        return cls(folder.name, records, json.loads(card.read_text()) if card.is_file() else {})

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


def write(folders: Sequence[Path], out: Path) -> None:
    """Write the page on the runs in `folders`. Raises ReportError for a folder without a run, or without matplotlib."""
    runs = [RunLog.read(folder) for folder in folders]
    title = "Training run" if len(runs) == 1 else f"{len(runs)} training runs"
    sections = [
        f"<h1>{title}</h1>",
        _table(runs),
        *(
            f"<p class='guard'><b>{html.escape(run.name)}</b>: {html.escape(text)}</p>"
            for run in runs
            for text in _warnings(run)
        ),
        "<h2>Curves</h2>",
        _curves(runs),
        "<h2>Spectra after the last epoch</h2>",
        _last_spectra(runs),
        "<h2>Spectra over the epochs</h2>",
        f"<p>{PICTURE}</p>",
        *(_spectrum_picture(run) for run in runs),
    ]
    page = f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
    page += f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    fresh = out.with_name(f"{out.name}.new")
    try:  # on a full disk the old page stays
        fresh.write_text(page)
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } th, td { padding: .3rem .6rem; text-align: right }
th { border-bottom: 2px solid #888; font-weight: 600 } td { border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } img { width: 100%; height: auto }
.guard { background: #fde8e8; border-left: 4px solid #c00; padding: .5rem 1rem }
h2 { margin-top: 2.5rem }
"""


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
    return "<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>" + "".join(rows) + "</table>"


def _curves(runs: Sequence[RunLog]) -> str:
    present = {name: value for name, value in CURVES.items() if any(run.series(value)[1] for run in runs)}
    columns = 3
    figure = _figure(13, 3.1 * math.ceil(len(present) / columns))
    for place, (name, value) in enumerate(present.items(), 1):
        axes = figure.add_subplot(math.ceil(len(present) / columns), columns, place)
        for colour, run in enumerate(runs):
            epochs, values = run.series(value)
            axes.plot(epochs, values, color=f"C{colour}", label=run.name, marker="." if len(epochs) < 30 else "")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        if place == 1 and len(runs) > 1:
            axes.legend(fontsize=8)
    return _image(figure)


def _last_spectra(runs: Sequence[RunLog]) -> str:
    figure = _figure(13, 4)
    for place, part in enumerate(PARTS, 1):
        axes = figure.add_subplot(1, 2, place)
        for colour, run in enumerate(runs):
            spectrum = run.records[-1][part]
            values = np.maximum(spectrum["eigenvalues"], 1e-12)
            axes.loglog(spectrum["ranks"], values, color=f"C{colour}", marker=".", label=run.name)
        axes.set_title(f"eigenvalues of the covariance, {part}", fontsize=10)
        axes.set_xlabel("rank", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _image(figure)


def _spectrum_picture(run: RunLog) -> str:
    figure = _figure(13, 3.6)
    for place, part in enumerate(PARTS, 1):
        axes = figure.add_subplot(1, 2, place)
        ranks = np.array(run.records[0][part]["ranks"], float)
        values = np.array([record[part]["eigenvalues"] for record in run.records], float).T
        shares = np.log10(np.maximum(values / np.maximum(values.max(axis=0), 1e-30), 10.0**-DECADES))
        epochs = np.array([record["epoch"] for record in run.records], float)
        edges = np.sqrt(np.concatenate([ranks[:1], ranks]) * np.concatenate([ranks, ranks[-1:]]))
        edges[0], edges[-1] = ranks[0] * 0.8, ranks[-1] * 1.1
        mesh = axes.pcolormesh(
            np.append(epochs - 0.5, epochs[-1] + 0.5), edges, shares, vmin=-DECADES, vmax=0, rasterized=True
        )
        axes.set_yscale("log")
        axes.set_title(f"{run.name}: {part}", fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_ylabel("rank", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(mesh, ax=axes, label="log10 of the share of the largest")
    return _image(figure)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("a report needs matplotlib: pip install 'fullrank-server[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _image(figure: Any) -> str:
    """The figure as a separate image, so that the identifiers of several SVG drawings cannot clash."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg", dpi=150, metadata={"Date": None})
    return f"<img alt='' src='data:image/svg+xml;base64,{base64.b64encode(drawing.getvalue()).decode()}'>"
