"""What halving the batch does to an accuracy: lines through all runs of a method, for a pair of runs says little."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks._experiments_cases import EXPERIMENTS
from benchmarks._methods_claims import RERUN, Record, knn, linear

SIMCLR, BARLOW, OVER = "SimCLR", "Barlow Twins", "Barlow Twins over SimCLR"
LEAST = 5  # runs: two lines that are parallel take three figures
Point = tuple[float, float, float]  # how often the batch was halved, the rate, points of an accuracy


class Slope(NamedTuple):
    """Points that each halving of the batch adds over `runs` runs, with the standard error that their scatter gives.

    chance: the standard error that RERUN gives, the points by which two runs of one recipe lie apart.
    """

    points: float
    error: float
    chance: float
    runs: int

    @property
    def told(self) -> str:
        return f"{self.points:+.2f} ± {self.error:.2f}"

    @property
    def doubt(self) -> float:
        """Points that chance may make: twice the larger error."""
        return 2 * max(self.error, self.chance)


def slope(points: Sequence[Point]) -> Slope | None:
    """The slope that lines share, one for each rate, by least squares; None where too few runs are there.

    Its standard error is that of the residuals, over as many runs as are left after the lines' figures.
    """
    if len(points) < LEAST:
        return None
    halvings, rates, values = (np.array(column) for column in zip(*points, strict=True))
    lines = np.unique(rates)
    design = np.column_stack([halvings, rates[:, None] == lines])
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ found
    spread = float(np.linalg.inv(design.T @ design)[0, 0]) ** 0.5
    scatter = math.sqrt(float(residuals @ residuals) / (len(points) - len(lines) - 1))
    return Slope(float(found[0]), scatter * spread, RERUN * spread, len(points))


def slopes(letter: str, ended: Sequence[Record], metric: Callable[[Record], float]) -> dict[str, Slope]:
    """The slope of each method over an experiment's runs, and of what lies between two of the same batch and rate.

    Those with too few runs are left out. Empty for experiments whose cases differ in something else.
    """
    cases = {case.name: case for case in EXPERIMENTS[letter].cases if "batch_size" in case.settings}
    points: dict[str, dict[tuple[float, float], float]] = {SIMCLR: {}, BARLOW: {}}
    for record in ended:
        if (case := cases.get(record["name"])) is not None:
            size = case.settings["batch_size"]
            place = -math.log2(size), case.settings["learning_rate"] / size
            points[case.name.partition(",")[0]][place] = metric(record)
    both = points[SIMCLR].keys() & points[BARLOW].keys()
    points[OVER] = {place: points[BARLOW][place] - points[SIMCLR][place] for place in sorted(both)}
    found = {name: slope([(*place, value) for place, value in each.items()]) for name, each in points.items()}
    return {name: each for name, each in found.items() if each is not None}


def table(letter: str, ended: Sequence[Record]) -> list[str]:
    """The slopes of an experiment on batches, by kNN and by the probe; nothing for another."""
    near, probe = (slopes(letter, ended, metric) for metric in (knn, linear))
    if not probe:
        return []
    lines = ["", "| points with each halving of the batch | kNN | probe | runs |", "|---|---|---|---|"]
    return lines + [f"| {name} | {near[name].told} | {probe[name].told} | {probe[name].runs} |" for name in probe]


def claim(letter: str, equal: str, ended: Sequence[Record]) -> str:
    """The row of the claims' table on what lies between the methods as the batch is halved."""
    cells = ["probe, with each halving of the batch: Barlow Twins over SimCLR, equal " + equal, "Zbontar"]
    cells += ["figure 2", letter]
    found = slopes(letter, ended, linear)
    if OVER not in found:
        return f"| {' | '.join(cells)} | | | not run: `python -m benchmarks.experiments {letter}` |"
    over = found[OVER]
    verdict = f"**unclear**, chance alone makes {over.doubt:.1f}"
    if abs(over.points) > over.doubt:
        verdict = "seen" if over.points > 0 else "**not seen**"
    cells.append(
        f"{found[BARLOW].points:.2f} against {found[SIMCLR].points:.2f} ({over.points:.1f} ± {over.error:.1f})"
    )
    return f"| {' | '.join(cells)} | 1 | {verdict} |"
