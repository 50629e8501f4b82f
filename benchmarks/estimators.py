"""Bias and spread of rank estimators against known populations, as the table of docs/measured/estimators.md.

    python -m benchmarks.estimators --dimension 128 512 2048 --repeats 4 --write docs/measured/estimators.md  # 15 min

Rows are Gaussian around a zero mean, so that uncentred measures are not put at a disadvantage. A run is one stream,
read whenever it has grown to the next n. Frequent Directions keeps d / 4 rows; Ledoit-Wolf shrinks towards the scaled
identity. Every cell is mean ± standard deviation over the runs, as a percentage of the population's own value of that
measure.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._page import write_between
from fullrank import Moments, measures

RATIOS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)


def populations(d: int) -> dict[str, Tensor]:
    """Name -> eigenvalues (d,)."""
    i = torch.arange(1, d + 1, dtype=torch.float64)
    k = d // 16
    return {
        "isotropic": torch.ones(d, dtype=torch.float64),
        "1/i": 1 / i,
        "exp(-12.8 i/d)": torch.exp(-12.8 * i / d),
        f"{k} live + 1e-4": torch.where(i <= k, 1.0, 1e-4),
    }


def ledoit_wolf(moments: Moments, eigenvalues: Tensor) -> Tensor:
    """Eigenvalues after optimal shrinkage to the scaled identity (Ledoit & Wolf 2004, section 3.3)."""
    n, d = moments.count, len(eigenvalues)
    centre = eigenvalues.mean()
    spread = float((eigenvalues - centre).square().sum() / d)
    fourth = moments.traces().fourth * (n - 1) / n
    noise = (fourth - float(eigenvalues.square().sum())) / (n * d)
    share = min(1.0, max(0.0, noise) / spread) if spread > 0 else 1.0
    shrunk: Tensor = (1 - share) * eigenvalues + share * centre
    return shrunk


class FrequentDirections:
    """A sketch of `keep` rows (Ghashami et al. 2016, algorithm 2), shrunk whenever it holds twice as many."""

    def __init__(self, dimension: int, keep: int) -> None:
        self.keep = keep
        self.rows = torch.zeros(0, dimension, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in (n, d) rows."""
        for batch in torch.split(rows, self.keep):
            self.rows = torch.cat((self.rows, batch))
            if len(self.rows) >= 2 * self.keep:
                self._shrink()

    def _shrink(self) -> None:
        # The right factor of the singular value decomposition, by way of the smaller Gram matrix: U^T B = S V^T.
        squares, left = torch.linalg.eigh(self.rows @ self.rows.T)
        squares, left = squares.flip(0)[: self.keep + 1], left.flip(1)[:, : self.keep]
        kept = (squares[:-1] - squares[-1]).clamp(min=0) / squares[:-1].clamp(min=1e-300)
        self.rows = kept.sqrt()[:, None] * (left.T @ self.rows)

    def eigenvalues(self) -> Tensor:
        """Squared singular values of the sketch, brought down to `keep` where it holds more."""
        squares: Tensor = torch.linalg.eigvalsh(self.rows @ self.rows.T).flip(0).clamp(min=0)
        if len(squares) > self.keep:
            return (squares[: self.keep] - squares[self.keep]).clamp(min=0)
        return squares


def estimates(moments: Moments, sketch: FrequentDirections) -> dict[str, float]:
    """Estimator -> its value on the rows so far; NaN where it declines."""
    n, covariance, mean = moments.count, moments.covariance(), moments.mean()
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    # RankMe's singular values are those of the rows themselves, of which there are min(n, d).
    squares = torch.linalg.eigvalsh(torch.addr(covariance * (n - 1), mean, mean, alpha=n)).flip(0)
    singular = squares[: min(n, len(squares))].clamp(min=0).sqrt()
    plug_in = measures.effective_rank(eigenvalues)
    correction = measures.entropy_correction(eigenvalues, n - 1, moments.traces().kurtosis)
    return {
        "PR unbiased": moments.participation_ratio(),
        "PR plug-in": measures.participation_ratio(eigenvalues),
        "erank gated": moments.effective_rank(eigenvalues),
        "erank corrected": plug_in * math.exp(correction),
        "erank plug-in": plug_in,
        # The reference basis; here the population's own, which is the axes.
        "erank in basis": measures.effective_rank(covariance.diagonal()),
        "erank Ledoit-Wolf": measures.effective_rank(ledoit_wolf(moments, eigenvalues)),
        "erank Freq. Dir.": measures.effective_rank(sketch.eigenvalues()),
        "RankMe 1e-7": measures.rankme(singular),
        "RankMe 1e-5": measures.rankme(singular, 1e-5),
    }


def truths(eigenvalues: Tensor) -> dict[str, float]:
    """First word of an estimator's name -> the population's value."""
    return {
        "PR": measures.participation_ratio(eigenvalues),
        "erank": measures.effective_rank(eigenvalues),
        "RankMe": measures.rankme(eigenvalues.sqrt(), 0.0),
    }


def run(eigenvalues: Tensor, ratios: Sequence[float], seed: int) -> list[dict[str, float]]:
    """The estimates at each number of rows, ratio x d, of one growing stream."""
    d = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    moments, sketch = Moments(d), FrequentDirections(d, d // 4)
    found = []
    for ratio in ratios:
        while (missing := int(ratio * d) - moments.count) > 0:
            sample = torch.randn(min(missing, d), d, generator=generator, dtype=torch.float32)
            rows = (sample * eigenvalues.sqrt().float()).double()
            moments.add(rows)
            sketch.add(rows)
        found.append(estimates(moments, sketch))
    return found


def table(d: int, ratios: Sequence[float], repeats: int, progress: Callable[[str], None]) -> list[str]:
    """Markdown lines for one dimension."""
    lines: list[str] = []
    for name, eigenvalues in populations(d).items():
        truth = truths(eigenvalues)
        runs = []
        for repeat in range(repeats):
            progress(f"d={d} {name} {repeat + 1}/{repeats}")
            runs.append(run(eigenvalues, ratios, repeat))
        names = list(runs[0][0])
        if not lines:
            lines += ["| population | n/d | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
        for ratio, found in zip(ratios, zip(*runs, strict=True), strict=True):
            cells = [cell([values[e] / truth[e.split()[0]] for values in found]) for e in names]
            lines.append(f"| {name} | {ratio:g} | " + " | ".join(cells) + " |")
    known = "; ".join(
        f"{name}: PR {t['PR']:.1f}, erank {t['erank']:.1f}, RankMe {t['RankMe']:.1f}"
        for name, t in ((name, truths(values)) for name, values in populations(d).items())
    )
    return [f"**d = {d}**, {repeats} runs; true values: {known}.", "", *lines]


def cell(ratios: list[float]) -> str:
    """Mean ± deviation in per cent; a dash where the estimator declined in any run."""
    values = torch.tensor(ratios, dtype=torch.float64)
    if values.isnan().any():
        return "–"
    spread = f" ± {100 * float(values.std()):.1f}" if len(values) > 1 else ""
    return f"{100 * float(values.mean()):.1f}{spread}"


def report(text: str) -> None:
    """Progress, where someone is looking."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", flush=True, file=sys.stderr)


def main() -> None:
    """Print the tables, or write them between the markers of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, nargs="+", default=[128])
    parser.add_argument("--ratio", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--write", type=Path, help="a page with markers for each dimension, to replace what is between")
    options = parser.parse_args()
    for d in options.dimension:
        text = "\n".join(table(d, sorted(options.ratio), options.repeats, report))
        report("")
        if options.write:
            # One dimension at a time: the widest takes most of the time, and no page waits for it.
            write_between(options.write, f"<!-- d={d}: start -->", f"<!-- d={d}: end -->", text)
        else:
            print(text + "\n", flush=True)


if __name__ == "__main__":
    main()
