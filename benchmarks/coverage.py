"""How often the 95 % bounds of the participation ratio hold the truth, over two dozen populations.

    python -m benchmarks.coverage --write docs/measured/coverage.md

Each population is a law of rows of which the truth is known: in closed form where one is at hand, else from 65,536
rows of each part. Windows of n rows pass through the monitor's own blocks, ten to a window as the ring keeps them,
and its own statistics. A window that declines, NaN, is counted apart: it promises nothing.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks._page import write_between
from fullrank import measures
from fullrank.monitor.blocks import Batch, BlockMaker
from fullrank.rows import unit
from fullrank.statistics import WindowStatistics, measure

GROUPS = 10
SEED = 17
TRUTH_ROWS = 1 << 16
Draw = Callable[[int, Generator], Tensor]


@dataclass(frozen=True)
class Population:
    """A law of rows: what a window of n rows of it looks like, and the parts it is a mixture of, each with its share.

    Without parts, windows are independent rows of the law.
    """

    name: str
    rows: int
    draw: Draw
    parts: tuple[tuple[float, Draw], ...] = ()

    def truth(self) -> float:
        """The participation ratio of its normalised rows, from 65,536 independent rows of each part."""
        generator = Generator().manual_seed(SEED)
        mean = square = torch.zeros(1, dtype=torch.float64)
        for share, draw in self.parts or ((1.0, self.draw),):
            rows = unit(draw(TRUTH_ROWS, generator).double())
            mean = mean + share * rows.mean(0)
            square = square + share * (rows.T @ rows) / TRUTH_ROWS
        return measures.participation_ratio(torch.linalg.eigvalsh(square - mean.outer(mean)))


def gaussian(scale: Tensor, mean: Tensor | float = 0.0) -> Draw:
    """Gaussian rows of these standard deviations (d,)."""
    return lambda n, g: torch.randn(n, len(scale), generator=g) * scale + mean


def power(d: int, exponent: float) -> Tensor:
    """Standard deviations (d,) of eigenvalues i^-exponent."""
    return torch.arange(1, d + 1).float() ** (-exponent / 2)


def axis(d: int, length: float = 1.0, which: int = -1) -> Tensor:
    """A vector (d,) along one axis."""
    vector = torch.zeros(d)
    vector[which] = length
    return vector


def student(n: int, d: int, degrees: int, g: Generator) -> Tensor:
    """(n, d) independent coordinates of Student's t."""
    squares = torch.randn(n, d, degrees, generator=g).square().mean(2)
    return torch.randn(n, d, generator=g) / squares.sqrt()


def mixed(name: str, rows: int, share: float, usual: Draw, rare: Draw) -> Population:
    """Each row of `rare` with probability `share`, else of `usual`."""

    def draw(n: int, g: Generator) -> Tensor:
        which = torch.rand(n, 1, generator=g) < share
        return torch.where(which, rare(n, g), usual(n, g))

    return Population(name, rows, draw, ((1 - share, usual), (share, rare)))


def classes(d: int, count: int, spread: float, run: int = 1, drift: bool = False) -> Draw:
    """Classes around fixed centres: in runs of `run` of one class, or with a mix that turns over the window."""
    middle = torch.randn(count, d, generator=Generator().manual_seed(5))

    def draw(n: int, g: Generator) -> Tensor:
        labels = torch.randint(count, (math.ceil(n / run),), generator=g).repeat_interleave(run)[:n]
        if drift:
            late = torch.rand(n, generator=g) < torch.arange(n) / n
            labels = labels // 2 + late.long() * (count // 2)
        return middle[labels] + spread * torch.randn(n, d, generator=g)

    return draw


def copied(law: Draw, times: int, noise: float) -> Draw:
    """Near-duplicates: n / times rows of a law, each `times` over, in random order, each with noise."""

    def draw(n: int, g: Generator) -> Tensor:
        rows = law(math.ceil(n / times), g).repeat_interleave(times, 0)[:n]
        lengths = noise * rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
        order = torch.randperm(n, generator=g)
        noisy: Tensor = rows + lengths * torch.randn(rows.shape, generator=g)
        return noisy[order]

    return draw


def one_hot(d: int, exponent: float) -> Draw:
    """Rows of a single one, at a place drawn with probability i^-exponent."""
    share = torch.arange(1, d + 1).float() ** -exponent
    rows = torch.eye(d)
    return lambda n, g: rows[torch.multinomial(share, n, replacement=True, generator=g)]


def populations() -> list[Population]:
    """The laws, each with the number of rows of its windows."""
    iso, wide, law = gaussian(torch.ones(64)), gaussian(torch.ones(256)), gaussian(power(64, 1.0))
    cone, point = gaussian(0.02 * power(64, 0.5), axis(64)), gaussian(1e-3 * torch.ones(64), axis(64))
    there, opposite = gaussian(0.05 * torch.ones(64), axis(64, 1.0, 0)), gaussian(0.05 * torch.ones(64), -axis(64))
    tenth, each = gaussian(0.1 * torch.ones(64), axis(64)), classes(64, 10, 0.7)
    tight, once = classes(64, 40, 0.3), ((1.0, law),)
    return [
        Population("Gaussian, isotropic, d = 64", 256, iso),
        Population("Gaussian, isotropic, d = 256, n < d", 128, wide),
        Population("Gaussian, variances 1/i, d = 64", 256, law),
        Population("Gaussian, variances 1/i², d = 64", 1024, gaussian(power(64, 2.0))),
        Population("Gaussian, variances exp(-i/8), d = 256", 256, gaussian(torch.exp(-torch.arange(256) / 16))),
        Population("8 live directions of 64, and 10⁻⁴", 256, gaussian(torch.where(torch.arange(64) < 8, 1.0, 0.01))),
        Population("one direction 30 times the others", 256, gaussian(1 + axis(64, 4.5, 0))),
        Population("one direction and nothing else", 256, gaussian(axis(64, 1.0, 0), axis(64))),
        Population("narrow cone about a mean", 1024, cone),
        Population("Student t, 3 degrees, about a mean", 512, lambda n, g: 0.3 * student(n, 64, 3, g) + axis(64, 10.0)),
        Population(
            "lengths of a Cauchy law, about a mean", 512, lambda n, g: iso(n, g) * student(n, 1, 1, g) + axis(64, 20.0)
        ),
        mixed("rare cluster, .005", 256, 0.005, cone, there),
        mixed("rare cluster, .001", 1024, 0.001, cone, there),
        mixed("rare cluster, .02", 1024, 0.02, cone, there),
        mixed("rare opposite cluster, .005", 256, 0.005, tenth, opposite),
        mixed("rare opposite cluster, .001", 1024, 0.001, tenth, opposite),
        mixed("rare scattered rows, .005", 256, 0.005, cone, iso),
        mixed("2 % scattered rows, others a point", 256, 0.02, point, iso),
        mixed("2 % scattered rows, others a point", 1024, 0.02, point, iso),
        mixed("2 % scattered rows, others a point", 4096, 0.02, point, iso),
        Population("near-duplicates, ten of each, shuffled", 256, copied(law, 10, 0.05), once),
        Population("near-duplicates, four of each, shuffled", 1024, copied(law, 4, 0.02), once),
        Population("copies, fifty of each, shuffled", 1024, copied(law, 50, 0.0), once),
        Population("ten tight classes, independent", 512, classes(64, 10, 0.1)),
        Population("a hundred classes, independent", 1024, classes(64, 100, 0.3)),
        Population("sessions of 32 of ten classes", 1024, classes(64, 10, 0.7, run=32), ((1.0, each),)),
        Population("sessions of 32 of ten classes", 6144, classes(64, 10, 0.7, run=32), ((1.0, each),)),
        Population("sessions of 128 of ten classes", 1024, classes(64, 10, 0.7, run=128), ((1.0, each),)),
        Population("sessions of 8 of forty tight classes", 256, classes(64, 40, 0.3, run=8), ((1.0, tight),)),
        Population(
            "class mix turning from one half to the other", 1024, classes(64, 10, 0.7, drift=True), ((1.0, each),)
        ),
        Population("float16 about a mean", 256, lambda n, g: (0.01 * law(n, g) + axis(64)).half().float()),
        Population("bfloat16 about a mean", 256, lambda n, g: (0.05 * law(n, g) + axis(64)).bfloat16().float()),
        Population("one-hot, alike", 256, one_hot(64, 0.0)),
        Population("one-hot, probabilities 1/i", 1024, one_hot(64, 1.0)),
        Population("corners of a cube", 256, lambda n, g: torch.randn(n, 64, generator=g).sign()),
        Population("half of the units silent (ReLU)", 512, lambda n, g: torch.relu(law(n, g))),
        Population("two opposite points, even", 256, lambda n, g: axis(64) * torch.randn(n, 1, generator=g).sign()),
    ]


def window(rows: Tensor) -> WindowStatistics:
    """The monitor's statistics of rows (n, d) that came in ten blocks."""
    d = rows.shape[1]
    maker = BlockMaker(d, None, (300.0,), math.ceil(len(rows) / GROUPS), lambda: 0.0, lambda _: None)
    maker.take([Batch(0.0, rows, None, None, None)], everything=True)
    return measure(300.0, maker.ring.blocks, None, d)


@dataclass(frozen=True)
class Coverage:
    """What windows of a population said: shares of windows, and medians over those that gave bounds."""

    truth: float
    covered: float
    declined: float
    lower: float
    estimate: float
    upper: float
    out_of_range: int

    @property
    def honest(self) -> bool:
        """Whether the bounds that were given hold the truth in nine of ten windows, and no figure leaves [1, d]."""
        return not self.out_of_range and (math.isnan(self.covered) or self.covered >= 0.9)


def coverage(population: Population, repeats: int, seed: int = SEED) -> Coverage:
    """Measure a population on so many windows."""
    truth = population.truth()
    generator = Generator().manual_seed(seed)
    given, outside = [], 0
    for _ in range(repeats):
        rows = population.draw(population.rows, generator)
        statistics = window(rows)
        ratio, rank = statistics.participation_ratio, statistics.effective_rank
        figures = [it for it in (ratio.lower, ratio.estimate, ratio.upper, rank) if not math.isnan(it)]
        outside += not all(1 - 1e-9 <= it <= rows.shape[1] + 1e-9 for it in figures)
        if not math.isnan(ratio.lower):
            given.append((ratio.lower, ratio.estimate, ratio.upper))
    table = torch.tensor(given, dtype=torch.float64).reshape(-1, 3)
    # The truth is known to half a million rows.
    held = (table[:, 0] <= truth * 1.002) & (table[:, 2] >= truth * 0.998)
    lower, estimate, upper = table.median(0).values.tolist() if len(table) else [math.nan] * 3
    covered = float(held.double().mean()) if len(table) else math.nan
    return Coverage(truth, covered, 1 - len(given) / repeats, lower, estimate, upper, outside)


def line(population: Population, found: Coverage) -> str:
    """A row of the table."""

    def percent(value: float) -> str:
        return "–" if math.isnan(value) else f"{100 * value:.0f} %"

    bounds = "–" if math.isnan(found.covered) else f"{found.estimate:.2f} ({found.lower:.2f} to {found.upper:.2f})"
    cells = [population.name, str(population.rows), f"{found.truth:.2f}", bounds]
    return "| " + " | ".join([*cells, percent(found.covered), percent(found.declined)]) + " |"


def main() -> None:
    """Print the table, or write it between the markers of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--write", type=Path, help="a page with the markers of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| population | rows | truth | estimate (bounds), medians | bounds hold the truth | no figure |",
        "|---|---|---|---|---|---|",
    ]
    dishonest = []
    for population in populations():
        found = coverage(population, options.repeats)
        lines.append(line(population, found))
        dishonest += [] if found.honest else [population.name]
        if not options.write:
            print("\n".join(lines[-3:] if len(lines) == 3 else lines[-1:]), flush=True)
    if options.write:
        lines += ["", f"{options.repeats} windows of each. Promised: 95 %."]
        write_between(options.write, "<!-- coverage: start -->", "<!-- coverage: end -->", "\n".join(lines))
    if dishonest:
        raise SystemExit(f"bounds that hold the truth in less than 90 %: {', '.join(dishonest)}")


if __name__ == "__main__":
    main()
