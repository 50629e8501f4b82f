"""Five laws of healthy traffic as runs of 64 rows, measured once each: a block is four runs, its sums are theirs.

Drawing a block afresh costs 256 rows. Drawing four of some thousand runs and adding up what is known of each costs a
sixtieth of that, and is the same law but for the runs being finitely many.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fullrank import Reference
from fullrank.calibration.ranges import BLOCK_ROWS
from fullrank.calibration.resample import Traffic

RUN = 64
RUNS = BLOCK_ROWS // RUN
# Of a block's scatter, these leading directions are kept with all their products; the others' variances alone.
LEADING = 48
HOURS = 24
BLOCKS_A_DAY = 24 * 3600 * 20 / BLOCK_ROWS
_CHUNK = 64


@dataclass(frozen=True)
class Sums:
    """Of several blocks or runs of rows: their number of rows each, and over those the sums (b, d) of the rows and of
    their squares, and (b, r (r + 1) / 2) of the products of the leading directions, those of two directions times the
    root of 2, so that inner products of these vectors are those of the matrices."""

    rows: int
    linear: Tensor
    squares: Tensor
    products: Tensor


class Law:
    """A law of healthy traffic: `rows` (hours, runs, 64), indices of the rows of each run, by the hour of the day."""

    def __init__(self, name: str, rows: Tensor, projected: Tensor) -> None:
        self.name = name
        self.rows = rows
        flat = rows.view(-1, RUN)
        measured = [_sums(projected[part]) for part in torch.split(flat, _CHUNK)]
        self.table = Sums(RUN, *(torch.cat(each) for each in zip(*measured, strict=True)))

    def draw(self, block: Tensor, generator: Generator) -> Tensor:
        """Numbers of blocks since midnight (b,) -> (b, 4) runs for each."""
        hours, runs, _ = self.rows.shape
        hour = (block * hours / BLOCKS_A_DAY).long() % hours
        return hour[:, None] * runs + torch.randint(runs, (len(block), RUNS), generator=generator)

    def sums(self, runs: Tensor) -> Sums:
        """Of blocks of runs (b, 4)."""
        table = self.table
        added = (F.embedding_bag(runs, each, mode="sum") for each in (table.linear, table.squares, table.products))
        return Sums(BLOCK_ROWS, *added)

    def rows_of(self, runs: Tensor) -> Tensor:
        """(k, 4) runs of blocks -> (k, 256) indices of their rows."""
        return self.rows.view(-1, RUN)[runs].view(len(runs), BLOCK_ROWS)


def _sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of rows (b, 64, d) -> their sums, in the order of `Sums`."""
    leading = rows[..., :LEADING]
    return rows.sum(1), rows.square().sum(1), packed(leading.transpose(1, 2) @ leading)


@cache
def _pairs(r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pairs of r directions: the first, the second, and the root of how often a symmetric matrix holds them."""
    i, j = torch.triu_indices(r, r)
    return i, j, torch.where(i == j, 1.0, math.sqrt(2))


def packed(matrices: Tensor) -> Tensor:
    """(..., r, r) symmetric -> (..., r (r + 1) / 2), such that inner products stay."""
    i, j, weight = _pairs(matrices.shape[-1])
    return matrices[..., i, j] * weight


def outer(vectors: Tensor) -> Tensor:
    """(..., d) -> (..., r (r + 1) / 2): the packed outer product of each vector's leading entries with itself."""
    leading = vectors[..., :LEADING]
    i, j, weight = _pairs(leading.shape[-1])
    return leading.index_select(-1, i).mul_(leading.index_select(-1, j)).mul_(weight)


def five(labels: Tensor, lightness: Tensor, seed: int) -> dict[str, Callable[[int, float], Tensor]]:
    """Five laws of healthy traffic, each (n, hour of the day) -> (n,) indices of rows.

    labels, lightness (n,): of their images. Independent rows; sessions of 32 of one class; a class mix that turns in a
    day, by half of each class's share; sessions of one class of 4 to 64 rows; a day's light: of each image more or
    fewer by up to half, the lightest most at noon and the darkest most at midnight. The first three are calibration's.
    """
    traffic = Traffic(labels, seed)
    generator = Generator().manual_seed(seed)
    rank = torch.empty(len(labels))
    rank[lightness.argsort()] = torch.linspace(-1, 1, len(labels))
    day = BLOCKS_A_DAY * BLOCK_ROWS

    def unequal(n: int, hour: float) -> Tensor:
        length = torch.exp2(2 + 4 * torch.rand(n // 4, generator=generator)).round().long()
        kind = torch.randint(len(traffic.classes), (n // 4,), generator=generator)
        return traffic.of(kind.repeat_interleave(length)[:n])

    def lit(n: int, hour: float) -> Tensor:
        weight = 1 - 0.5 * math.cos(2 * math.pi * hour / HOURS) * rank
        return torch.multinomial(weight, n, replacement=True, generator=generator)

    return {
        "independent": lambda n, hour: traffic.independent(n),
        "sessions": lambda n, hour: traffic.sessions(n),
        "drifting": lambda n, hour: traffic.drifting(n, int(day * hour / HOURS)),
        "unequal sessions": unequal,
        "daylight": lit,
    }


def laws(reference: Reference, rows: Tensor, labels: Tensor, lightness: Tensor, runs: int, seed: int) -> list[Law]:
    """The laws of `five` over unit rows (n, d), each of about so many runs."""
    projected = (rows - reference.mean.float()) @ reference.basis.float()
    made = []
    for name, draw in five(labels, lightness, seed).items():
        if name in ("drifting", "daylight"):
            index = torch.stack([draw(runs // HOURS * RUN, hour) for hour in range(HOURS)])
        else:
            index = draw(runs * RUN, 0)[None]
        made.append(Law(name, index.view(len(index), -1, RUN), projected))
    return made
