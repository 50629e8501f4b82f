"""Compares two encoders by their rows of the same images: what changes for a search if one replaces the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.bounds import Interval, jackknife
from fullrank.monitor.snapshot import GROUPS
from fullrank.neighbours import correlation, nearest, overlap, ranks, squared_distances

NEIGHBOURS = (1, 5, 10, 50)


def kept_neighbours(first: Tensor, second: Tensor) -> Tensor:
    """(m,) the share of each row's k neighbours that both lists (m, k) have; its mean is `neighbours.overlap`."""
    return (first[:, :, None] == second[:, None, :]).any(2).double().mean(1)


@dataclass(frozen=True)
class Comparison:
    """Two encoders on the same m images.

    overlaps: k -> the mean share of the k nearest images that stay, with 95 % bounds; distances: Spearman's
    correlation of all pairs' distances, with bounds; kept (m,): the share of an image's `depth` nearest that stay;
    moved (m,): images by how much their neighbours changed, most first; told (p, 2): pairs of images that the second
    encoder tells apart and the first does not.
    """

    images: int
    depth: int
    overlaps: dict[int, Interval]
    distances: Interval
    kept: Tensor
    moved: Tensor
    told: Tensor
    squares: tuple[Tensor, Tensor]
    near: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, first: Tensor, second: Tensor, pairs: int = 4) -> "Comparison":
        """Compare rows (m, d) and (m, e) of the same m >= 12 images in the same order."""
        m = len(first)
        squares = squared_distances(first), squared_distances(second)
        ks = [k for k in NEIGHBOURS if k <= (m - 1) // 2] or [1]
        near = nearest(squares[0], ks[-1]), nearest(squares[1], ks[-1])
        depth = max((k for k in ks if k <= 10), default=1)
        kept = kept_neighbours(near[0][:, :depth], near[1][:, :depth])
        groups = torch.arange(m).chunk(GROUPS)
        weights = torch.tensor([float(len(it)) for it in groups], dtype=torch.float64)
        whole, *left = _figures(squares, ks, groups)
        bounded = [_bounded(whole[i], [it[i] for it in left], weights) for i in range(len(whole))]
        own = _own(squares)
        order = sorted(range(m), key=lambda i: (float(kept[i]), own[i]))
        return cls(
            m,
            depth,
            dict(zip(ks, bounded[1:], strict=True)),
            bounded[0],
            kept,
            torch.tensor(order),
            _told_apart(squares, pairs),
            squares,
            (near[0][:, :depth], near[1][:, :depth]),
        )


def _figures(squares: tuple[Tensor, Tensor], ks: list[int], groups: Sequence[Tensor]) -> list[list[float]]:
    """Spearman's correlation of the distances, then the mean overlap at each k: of all images, then without each group.

    The distances are sorted once: what is left of them without a group stays in order.
    """
    m = len(squares[0])
    upper = torch.triu_indices(m, m, 1)
    orders = [it[upper[0], upper[1]].argsort() for it in squares]
    found = []
    for group in (torch.empty(0, dtype=torch.int64), *groups):
        keep = torch.ones(m, dtype=torch.bool)
        keep[group] = False
        pairs = keep[upper].all(0)
        places = []
        for order in orders:
            place = torch.empty(len(order), dtype=torch.int64)
            place[order] = pairs[order].cumsum(0) - 1
            places.append(place[pairs])
        near = [nearest(it[keep][:, keep], ks[-1]) for it in squares]
        found.append([correlation(*places), *(overlap(near[0][:, :k], near[1][:, :k]) for k in ks)])
    return found


def _bounded(value: float, left: list[float], weights: Tensor) -> Interval:
    half = jackknife(value, left, weights) if all(math.isfinite(it) for it in (value, *left)) else math.nan
    return (
        Interval(max(-1.0, value - half), value, min(1.0, value + half)) if half == half else Interval(estimate=value)
    )


def _own(squares: tuple[Tensor, Tensor]) -> list[float]:
    """Spearman's correlation of each image's distances to all others."""
    m = len(squares[0])
    others = [it[~torch.eye(m, dtype=torch.bool)].reshape(m, m - 1) for it in squares]
    return [correlation(ranks(a), ranks(b)) for a, b in zip(*others, strict=True)]


def _told_apart(squares: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Pairs that are no nearer than most in the second encoder, and nearest for that in the first; each image once."""
    m = len(squares[0])
    upper = torch.triu_indices(m, m, 1)
    first, second = (it[upper[0], upper[1]] for it in squares)
    far = second >= second.median()
    order = torch.where(far, first, math.inf).argsort(stable=True)
    return distinct(upper[:, order[: 64 * count]].T, count)


def distinct(pairs: Tensor, count: int) -> Tensor:
    """The first `count` pairs of (p, 2) that share no image."""
    used: set[int] = set()
    chosen = []
    for a, b in pairs.tolist():
        if a not in used and b not in used:
            chosen.append((a, b))
            used |= {a, b}
        if len(chosen) == count:
            break
    return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)


def differ_only_in(rows: Tensor, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs (p, 2) of rows (m, d) whose difference lies most in `directions` (d, w), and its share of it (p,).

    Only pairs at least as far apart as a quarter of all are considered: two copies differ in rounding alone.
    """
    m = len(rows)
    wide = rows.double()
    inside = torch.cdist(wide @ directions.double(), wide @ directions.double()).square()
    whole = torch.cdist(wide, wide).square()
    upper = torch.triu_indices(m, m, 1)
    distance = whole[upper[0], upper[1]]
    share = inside[upper[0], upper[1]] / distance.clamp_min(1e-30)
    least = float(distance.quantile(0.25))
    share = torch.where(distance >= least, share, -1.0)
    order = share.argsort(descending=True, stable=True)[: 64 * count]
    pairs = distinct(upper[:, order].T, count)
    shares = torch.tensor([float(inside[a, b] / whole[a, b]) for a, b in pairs.tolist()], dtype=torch.float64)
    return pairs, shares
