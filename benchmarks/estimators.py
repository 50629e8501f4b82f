"""Bias and spread of rank estimators against populations whose rank is known, as the table of docs/statistics.md.

    python -m benchmarks.estimators --dimension 128 512 --repeats 8 --write docs/statistics.md

Rows are Gaussian around a zero mean, so that uncentred measures are not put at a disadvantage. Frequent Directions
keeps d / 2 rows; Ledoit-Wolf shrinks towards the scaled identity. Every cell is mean ± standard deviation over the
repeats, as a percentage of the population's own value of that measure.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fullrank import Moments, measures

RATIOS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
START, END = "<!-- estimators: start -->", "<!-- estimators: end -->"


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


def ledoit_wolf(rows: Tensor, covariance: Tensor) -> Tensor:
    """Eigenvalues after optimal shrinkage to the scaled identity (Ledoit & Wolf 2004, section 3.3)."""
    n, d = rows.shape
    values = torch.linalg.eigvalsh(covariance)
    centre = values.mean()
    spread = float((values - centre).square().sum() / d)
    noise = float((rows.square().sum(1).square().sum() / n - covariance.square().sum()) / (n * d))
    share = min(1.0, max(0.0, noise) / spread) if spread > 0 else 1.0
    shrunk: Tensor = (1 - share) * values + share * centre
    return shrunk


def frequent_directions(rows: Tensor, keep: int) -> Tensor:
    """Squared singular values of the sketch of `keep` rows (Ghashami et al. 2016, algorithm 2)."""
    sketch = torch.zeros(0, rows.shape[1], dtype=rows.dtype)
    for batch in torch.split(rows, keep):
        _, s, v = torch.linalg.svd(torch.cat((sketch, batch)), full_matrices=False)
        squares: Tensor = s.square()
        if len(s) > keep:
            squares = (squares - squares[keep]).clamp(min=0)[:keep]
        sketch = squares.sqrt()[:, None] * v[: len(squares)]
    spectrum: Tensor = torch.linalg.svdvals(sketch).square()
    return spectrum


def estimates(rows: Tensor) -> dict[str, float]:
    """Estimator -> its value on (n, d) rows; NaN where it declines."""
    moments = Moments(rows.shape[1]).add(rows)
    covariance = moments.covariance()
    eigenvalues = torch.linalg.eigvalsh(covariance)
    singular = torch.linalg.svdvals(rows)
    plug_in = measures.effective_rank(eigenvalues)
    correction = measures.entropy_correction(eigenvalues, len(rows) - 1, moments.traces().kurtosis)
    return {
        "PR unbiased": moments.participation_ratio(),
        "PR plug-in": measures.participation_ratio(eigenvalues),
        "erank gated": moments.effective_rank(eigenvalues),
        "erank corrected": plug_in * math.exp(correction),
        "erank plug-in": plug_in,
        # The reference basis; here the population's own, which is the axes.
        "erank in basis": measures.effective_rank(covariance.diagonal()),
        "erank Ledoit-Wolf": measures.effective_rank(ledoit_wolf(rows - rows.mean(0), covariance)),
        "erank Freq. Dir.": measures.effective_rank(frequent_directions(rows, rows.shape[1] // 2)),
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


def table(d: int, ratios: tuple[float, ...], repeats: int, progress: Callable[[str], None]) -> list[str]:
    """Markdown lines for one dimension."""
    lines: list[str] = []
    for name, eigenvalues in populations(d).items():
        truth = truths(eigenvalues)
        for ratio in ratios:
            n = int(ratio * d)
            generator = torch.Generator().manual_seed(n)
            runs = []
            for repeat in range(repeats):
                progress(f"d={d} {name} n={n} {repeat + 1}/{repeats}")
                sample = torch.randn(n, d, generator=generator, dtype=torch.float32)
                runs.append(estimates((sample * eigenvalues.sqrt().float()).double()))
            if not lines:
                names = list(runs[0])
                lines += ["| population | n/d | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
            cells = [cell([run[e] / truth[e.split()[0]] for run in runs]) for e in names]
            lines.append(f"| {name} | {ratio:g} | " + " | ".join(cells) + " |")
    known = "; ".join(
        f"{name}: PR {t['PR']:.1f}, erank {t['erank']:.1f}, RankMe {t['RankMe']:.1f}"
        for name, t in ((name, truths(values)) for name, values in populations(d).items())
    )
    return [f"**d = {d}**, true values: {known}.", "", *lines, ""]


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
    parser.add_argument("--write", type=Path, help="a page with the two markers, to replace what is between them")
    options = parser.parse_args()
    lines: list[str] = []
    for d in options.dimension:
        lines += table(d, tuple(options.ratio), options.repeats, report)
    report("")
    if options.write:
        page = options.write.read_text()
        before, rest = page.split(START)
        _, after = rest.split(END)
        options.write.write_text("\n".join([before + START, *lines, END + after]))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
