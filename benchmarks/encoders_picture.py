"""The picture of the training of encoders: kNN over the epochs, and the spectrum's fall or rise.

    python -m benchmarks.encoders_picture RUN [RUN ...] [--out docs/images/encoders.png]

RUN is a folder with a log.jsonl: a run's, or a shipped encoder's. Each row is a run. Left: weighted kNN on held-out
training images (bank: 10,000 others), after each epoch. Middle and right: eigenvalues of the covariance of unit rows,
over the largest, by rank, on logarithmic axes, from the first epoch (dark) to the last (bright).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.report import PARTS, RunLog

FLOOR = 1e-7


def picture(runs: Sequence[RunLog]) -> Figure:
    """One row a run, three columns."""
    figure = Figure(figsize=(12, 3.2 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 3, squeeze=False)
    for run, (curve, *spectra) in zip(runs, grid, strict=True):
        epochs, values = run.series(lambda record: record["knn"])
        curve.plot(epochs, [100 * value for value in values], marker=".")
        curve.set(title=f"{run.name}: kNN %, held-out images", xlabel="epoch")
        curve.xaxis.get_major_locator().set_params(integer=True)
        curve.grid(alpha=0.3)
        for axes, part in zip(spectra, PARTS, strict=True):
            draw_spectra(axes, run, part)
    return figure


def draw_spectra(axes: Axes, run: RunLog, part: str) -> None:
    """Each epoch's eigenvalues over its largest."""
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.95, len(run.records)))
    for record, colour in zip(run.records, colours, strict=True):
        values = np.array(record[part]["eigenvalues"], float)
        shares = np.maximum(values / max(values.max(), 1e-30), FLOOR)
        axes.loglog(record[part]["ranks"], shares, color=colour, linewidth=1)
    axes.set(title=f"{part}, {run.records[0][part]['dimension']} dimensions", xlabel="rank", ylim=(FLOOR, 1.5))
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/encoders.png"))
    given = parser.parse_args()
    picture([RunLog.read(folder) for folder in given.runs]).savefig(given.out, dpi=90)


if __name__ == "__main__":
    main()
