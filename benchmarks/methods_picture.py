"""The picture of the methods' spectra: eigenvalues of h and of z after training, beside both untrained twins.

    python -m benchmarks.methods_picture [--out docs/images/methods.png]

Drawn from the first seed's lines of benchmarks/methods.jsonl that hold a spectrum. Eigenvalues of the covariance of
L2-normalised test rows, over the largest, by rank over the dimension, so that projections of 32 to 512 dimensions share
an axis.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks._methods_configurations import TWINS
from benchmarks.experiments import DEAD_H, DEAD_Z

SHOWN = ("SimCLR", "DirectCLR", "BYOL", "SimSiam", "DirectPred", "DirectCopy", "Barlow Twins", "VICReg", "SIGReg")
FLOOR = 1e-9
TITLES = {"h": "Representation h", "z": "What the loss sees, z"}


def picture(records: Sequence[dict[str, Any]]) -> Figure:
    """Two panels, h and z; `records` are lines of one seed that hold eigenvalues."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_name = {record["name"]: record for record in records}
    panels = figure.subplots(1, 2)
    for axes, (part, dead) in zip(panels, (("h", DEAD_H), ("z", DEAD_Z)), strict=True):
        draw(axes, by_name, part)
        axes.axhline(dead, color="black", linewidth=0.6, linestyle=":")
        axes.set(title=TITLES[part], xlabel="rank / dimension", ylabel="eigenvalue / largest", ylim=(FLOOR, 1.5))
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7, loc="lower left", ncols=2)  # where no spectrum reaches
    return figure


def draw(axes: Axes, by_name: dict[str, dict[str, Any]], part: str) -> None:
    """One line a method, and both twins in grey."""
    colours = mpl.colormaps["tab10"](np.delete(np.arange(10), 7))  # without grey, the twins'
    for name, style in zip(TWINS.values(), ("--", ":"), strict=True):
        if name not in by_name:
            continue
        axes.semilogy(*curve(by_name[name][part]), style, color="grey", label=name)
    for name, colour in zip(SHOWN, colours, strict=True):
        if name not in by_name:
            continue
        width = 2.5 if name == "SIGReg" else 1.2
        axes.semilogy(*curve(by_name[name][part]), color=colour, linewidth=width, label=name)


def curve(spectrum: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ranks over the dimension, and eigenvalues over the largest."""
    values = np.array(spectrum["eigenvalues"], float)
    return np.array(spectrum["ranks"], float) / spectrum["dimension"], np.maximum(values / values[0], FLOOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/methods.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/methods.png"))
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    first = [record for record in lines if record["seed"] == 0 and "eigenvalues" in record.get("h", {})]
    missing = {*SHOWN, *TWINS.values()} - {record["name"] for record in first}
    if missing:
        print(f"{given.results} has no spectrum of {', '.join(sorted(missing))}; python -m benchmarks.methods")
    picture(first).savefig(given.out, dpi=90)


if __name__ == "__main__":
    main()
