"""Draws the pictures of docs/explanation/statistics.md from the shipped encoders and a known law.

    python -m benchmarks.pictures --out docs/images

spectra.png: eigenvalues of the sample's embeddings under fashion-directclr as shipped, behind a layer of rank 16
(dimensional collapse), drowned in its own mean (complete collapse), on one class only (narrow traffic), and under the
encoder that collapsed while it was trained. few-rows.png: what plug-in and corrected estimators read as n grows, for an
isotropic law and for one whose eigenvalues fall as 1/i, in 64 dimensions.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.precision import behind_rank, rows_in
from fullrank import Moments, measures
from fullrank.rows import unit
from models.artifact import load
from tools.demo import COLLAPSED
from training.data import SAMPLE, read_fashion_mnist

PRETRAINED = Path("models/pretrained")


def eigenvalues(rows: Tensor) -> Tensor:
    """(d,) of the covariance of rows (n, d), falling; what is empty lies at the picture's floor."""
    values: Tensor = torch.linalg.eigvalsh(Moments(rows.shape[1]).add(rows).covariance()).flip(0)
    return values.clamp(min=1e-9)


def draw_spectra(axes: Axes) -> None:
    """Five spectra of real images."""
    parts = [read_fashion_mnist(SAMPLE, part) for part in ("train", "test")]
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    shipped = load(PRETRAINED / "fashion-directclr")
    healthy = rows_in(shipped, "float32", images)
    shown = {
        "healthy": healthy,
        "narrow traffic: one class": healthy[labels == 1],
        "dimensional collapse: rank 16": rows_in(behind_rank(shipped, 16), "float32", images),
        "complete collapse: drowned in its mean": healthy.mean(0) + 0.02 * (healthy - healthy.mean(0)),
        "collapsed in training": rows_in(load(COLLAPSED), "float32", images),
    }
    for name, rows in shown.items():
        values = eigenvalues(unit(rows))
        label = f"{name} (effective rank {measures.effective_rank(values):.0f}, variance {float(values.sum()):.2g})"
        axes.loglog(range(1, len(values) + 1), values, label=label)
    axes.set(xlabel="direction", ylabel="variance along it", ylim=(1e-9, 1), title="256 dimensions, 2,000 images")
    axes.legend(fontsize=7, loc="lower left")


def draw_few_rows(axes: Axes, values: Tensor, title: str, runs: int = 20) -> None:
    """Estimates over the truth against n / d."""
    d = len(values)
    truth = {"rank": measures.effective_rank(values), "ratio": measures.participation_ratio(values)}
    generator = torch.Generator().manual_seed(0)
    ratios = [2.0**k for k in range(-1, 6)]
    curves: dict[str, list[float]] = {}
    for ratio in ratios:
        found: dict[str, list[float]] = {}
        for _ in range(runs):
            rows = torch.randn(int(ratio * d), d, generator=generator, dtype=torch.float64) * values.sqrt()
            moments = Moments(d).add(rows)
            sample = torch.linalg.eigvalsh(moments.covariance()).clamp(min=0)
            for name, value in (
                ("effective rank, plug-in", measures.effective_rank(sample) / truth["rank"]),
                ("effective rank, as reported", moments.effective_rank(sample) / truth["rank"]),
                ("participation ratio, plug-in", measures.participation_ratio(sample) / truth["ratio"]),
                ("participation ratio, as reported", moments.participation_ratio() / truth["ratio"]),
            ):
                found.setdefault(name, []).append(value)
        for name, runs_of in found.items():
            curves.setdefault(name, []).append(float(torch.tensor(runs_of).mean()))
    for name, style in zip(curves, ("C0--", "C0-", "C1--", "C1-"), strict=True):
        axes.semilogx(ratios, curves[name], style, base=2, label=name)
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="rows / dimensions", ylabel="estimate / truth", ylim=(0, 1.15), title=title)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_spectra(figure.subplots())
    save(figure, options.out / "spectra.png")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_few_rows(left, torch.ones(64, dtype=torch.float64), "isotropic")
    draw_few_rows(right, 1 / torch.arange(1, 65, dtype=torch.float64), "eigenvalues 1/i")
    right.legend(fontsize=8, loc="lower right")
    save(figure, options.out / "few-rows.png")


if __name__ == "__main__":
    main()
