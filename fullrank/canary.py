"""Canary: what fixed images embed to now, beside what they embedded to when the reference was made."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.moments import Moments
from fullrank.neighbours import NEIGHBOURS, nearest, overlap, rank_correlation, squared_distances
from fullrank.rows import unit


@dataclass(frozen=True)
class Canary:
    """The canary images' embeddings now, against the stored ones; NaN where an embedding is not finite.

    cosine_min: least cosine of an image's embedding to its stored one; participation_ratio: of all of them;
    angle_degrees, angle_median_degrees: the largest angle to a stored embedding, and the middle one;
    neighbours_overlap: mean share of an image's 10 nearest canary images that are still among its 10 nearest, in
    [0, 1]: what a search loses; distance_correlation: Spearman's, of the distances of all pairs, in [-1, 1].
    """

    cosine_min: float
    participation_ratio: float
    angle_degrees: float = math.nan
    angle_median_degrees: float = math.nan
    neighbours_overlap: float = math.nan
    distance_correlation: float = math.nan


class CanaryReader:
    """Compares embeddings of the canary images with the stored ones, (m, d). What is stored is measured once."""

    def __init__(self, stored: Tensor) -> None:
        self._stored = unit(stored.double())
        self._neighbours: Tensor | None = None
        self._distances: Tensor | None = None

    def read(self, rows: Tensor) -> Canary:
        """The figures of rows (m, d), in the order of the stored ones. A distance correlation costs m^2 log m."""
        units = unit(rows.double())
        ratio = Moments(units.shape[1]).add(units).participation_ratio()
        cosines = (units * self._stored).sum(1)
        if not bool(units.isfinite().all()):
            return Canary(math.nan, ratio)
        # From the chord: the arc cosine loses half of the digits near 1.
        chords = torch.linalg.vector_norm(units - self._stored, dim=1)
        angles = torch.rad2deg(2 * torch.asin((chords / 2).clamp(max=1)))
        squares = squared_distances(units)
        kept, correlation = self._neighbourhoods(squares)
        return Canary(float(cosines.min()), ratio, float(angles.max()), float(angles.median()), kept, correlation)

    def _neighbourhoods(self, squares: Tensor) -> tuple[float, float]:
        m = len(squares)
        if m <= NEIGHBOURS + 1:
            return math.nan, math.nan
        pairs = torch.triu_indices(m, m, 1)
        if self._neighbours is None or self._distances is None:
            before = squared_distances(self._stored)
            self._neighbours = nearest(before)
            self._distances = before[pairs[0], pairs[1]]
        now = squares[pairs[0], pairs[1]]
        return overlap(self._neighbours, nearest(squares)), rank_correlation(self._distances, now)
