"""The gate: judges on canary images whether an encoder is collapsed, before it serves.

The encoder is compared with the incumbent, the encoder that serves now, or with fixed floors if there is none. Its own
reference is no measure: to that, a collapsed encoder looks normal. The service's swap and `fullrank check` use this.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullrank import Moments, Reference, measures
from fullrank.moments import MINIMUM_ROWS_PARTICIPATION
from fullrank.profile import log_bands
from fullrank.verdict import (
    CANARY_COSINE,
    NUMERICAL_RANK_SHARE,
    PARTICIPATION_COLLAPSE_SHARE,
    TAIL_LOW,
    VARIANCE_FLOOR,
    VARIANCE_SHARE,
)
from models.artifact import Artifact, ArtifactError, Canary
from models.embedder import Embedder, least_cosine, normalize
from models.engines import PARITY_COSINE
from models.preprocess import Pixels, Preprocessing

FLOOR_PARTICIPATION_RATIO = 3.0
MAX_DEAD_FRACTION = 0.5
PRECISION_IMAGES = 32  # of the canary, on which a precision's rows are compared with those in float32
SAME = 0.9  # a figure of at least this share of the incumbent's counts as not lower


@dataclass(frozen=True)
class Figures:
    """The geometry of one encoder's L2-normalised embeddings of the canary images."""

    rows: int  # finite ones
    dimension: int
    participation_ratio: float  # unbiased; NaN below 32 rows
    effective_rank: float  # plug-in: compared only between encoders on the same images
    total_variance: float
    dead_fraction: float  # share of the coordinates that vary less than the serving precision's rounding
    alive_fraction: float  # share of the directions, of those the rows can span, that vary more than that
    leading: int  # directions that hold 90 % of the variance
    eigenvalues: tuple[float, ...] = field(repr=False)  # descending, of all directions that the rows can span

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype = torch.float32) -> "Figures":
        """rows (m, d), normalised or not, embedded with `dtype`; rows that are not finite are left out."""
        rows = normalize(rows[rows.isfinite().all(dim=1)].double())
        m, d = rows.shape
        if m < 2:
            return cls(m, d, math.nan, math.nan, math.nan, 1.0, 0.0, 0, ())
        moments = Moments(d).add(rows)
        floor = measures.noise_floor(dtype, d)
        variances = rows.var(dim=0)
        span = min(d, m - 1)
        eigenvalues = measures.spectrum(moments.covariance())
        shares = eigenvalues.cumsum(0) / eigenvalues.sum()
        return cls(
            rows=m,
            dimension=d,
            participation_ratio=moments.participation_ratio(),
            effective_rank=measures.effective_rank(eigenvalues),
            total_variance=float(variances.sum()),
            dead_fraction=float((variances <= floor).double().mean()),
            alive_fraction=min(1.0, measures.numerical_rank(eigenvalues, floor) / span),
            leading=int((shares < 0.9).sum()) + 1,
            eigenvalues=tuple(eigenvalues[:span].tolist()),
        )


@dataclass(frozen=True)
class Check:
    """One criterion: what was measured, the least it may be (`most`: the most), and whether it holds."""

    name: str
    words: str
    value: float
    limit: float
    passed: bool
    most: bool = False

    def __str__(self) -> str:
        return f"{self.words} {self.value:.3g}, {'at most' if self.most else 'at least'} {self.limit:.3g}"


@dataclass(frozen=True)
class Directions:
    """Directions `first` to `last` (1-based, by falling variance) that hold `share` of the variance they should."""

    first: int
    last: int
    share: float


@dataclass(frozen=True)
class Judgement:
    """The gate's decision, its reason in words, and the figures behind it. incumbent is None if floors were used."""

    passed: bool
    reason: str
    checks: tuple[Check, ...] = ()
    dead: tuple[Directions, ...] = ()
    candidate: Figures | None = None
    incumbent: Figures | None = None


def judge(embedder: Embedder, candidate: Artifact, against: Artifact | None = None) -> Judgement:
    """Judge `candidate`, run by `embedder`, on the incumbent's canary images, or on its own if there are none."""
    judge_of = incumbent_canary(against) or candidate.canary
    rows = embedder.embed_arrays(judge_of.images) if judge_of is not None else None
    own = rows
    if candidate.canary is not None and judge_of is not candidate.canary:
        own = embedder.embed_arrays(candidate.canary.images)
    return judge_rows(candidate, against, rows, own, embedder.dtype)


def incumbent_canary(against: Artifact | None) -> Canary | None:
    """The incumbent's canary, on which a candidate is judged instead of its own; None if there is none."""
    return None if against is None else against.canary


def judge_rows(
    candidate: Artifact, against: Artifact | None, rows: Tensor | None, own: Tensor | None, dtype: torch.dtype
) -> Judgement:
    """Judge `candidate` by its embeddings of the incumbent's canary images, or of its own if there are none.

    rows: (m, d), not normalised, embedded with `dtype`, of these images; None if neither encoder has canary images.
    own: (m, d), of the candidate's own canary images.
    """
    incumbent = incumbent_canary(against)
    canary = incumbent or candidate.canary
    if canary is None or rows is None:
        remedy = "build a reference with `fullrank reference ENCODER --data DIR`"
        return Judgement(False, f"there are no canary images to judge by; {remedy}")
    figures, stored = Figures.of(rows, dtype), Figures.of(canary.embeddings, dtype)
    baseline = stored if incumbent is not None else None
    finite = figures.rows / len(rows)
    checks = [Check("finite", "share of canary images with finite embeddings", finite, 1.0, finite == 1)]
    if candidate.canary is not None and own is not None:
        checks.append(_intact(own, candidate.canary.embeddings))
    checks += varied(figures, baseline)
    faults = [str(check) for check in checks if not check.passed]
    how = _judged_how(candidate, against)
    if not faults:
        return Judgement(True, f"as varied as it should be; {how}", tuple(checks), (), figures, baseline)
    dead = _dead(figures, stored)
    whose = "the incumbent's" if baseline else "the stored"
    faults += [f"directions {it.first} to {it.last} hold {it.share:.2g} of {whose} variance" for it in dead]
    faults.append(f"{figures.leading} of {figures.dimension} directions hold 90 % of its variance")
    return Judgement(False, "; ".join([*faults, how]), tuple(checks), dead, figures, baseline)


def _judged_how(candidate: Artifact, against: Artifact | None) -> str:
    """By what a candidate is judged and on which images, in words; also how it takes them if its input is another."""
    canary = incumbent_canary(against)
    if against is None or canary is None:
        own = 0 if candidate.canary is None else len(candidate.canary.images)
        instead = "" if against is None else f", since {against.card.name} has none"
        return f"judged by fixed floors on its own {own} canary images{instead}"
    words = f"judged beside {against.card.name} on its {len(canary.images)} canary images"
    taken, given = (_input(it.card.preprocessing) for it in (candidate, against))
    return words if taken == given else f"{words}, {given}, which {candidate.card.name} takes at {taken}"


def _input(preprocessing: Preprocessing) -> str:
    colour = "grey" if preprocessing.channels == 1 else "colour"
    return f"{preprocessing.size} x {preprocessing.size} pixels in {colour}"


def synthetic(preprocessing: Preprocessing) -> Pixels:
    """Six synthetic images (6, channels, size, size) uint8, to test any encoder, even one without canary images.

    They are black, white, two ramps, a checkerboard and noise, the same each time.
    """
    size, channels = preprocessing.size, preprocessing.channels
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    y, x = np.mgrid[:size, :size]
    flat = np.zeros((size, size), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    board = ((x // 4 + y // 4) % 2 * 255).astype(np.uint8)
    images = np.stack([flat, flat + 255, np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)), board, noise])
    return np.repeat(images[:, None], channels, axis=1)


def hold_to_float32(embedder: Embedder, artifact: Artifact, images: Tensor | None = None) -> None:
    """Raise ArtifactError unless rows in the embedder's precision have cosine 0.9999 with those in float32.

    images (m, channels, size, size) uint8 are the canary's if none are given; the first PRECISION_IMAGES count. Without
    any the engine's own test at its start has to do.
    """
    if images is None and artifact.canary is not None:
        images = artifact.canary.images
    if embedder.dtype == torch.float32 or images is None:
        return
    images = images[:PRECISION_IMAGES]
    exact = Embedder(artifact, embedder.device)
    if (cosine := least_cosine(embedder.embed(images), exact.embed(images))) < PARITY_COSINE:
        dtype = str(embedder.dtype).removeprefix("torch.")
        raise ArtifactError(
            f"{artifact.card.name}: in {dtype} its canary images give embeddings of cosine {cosine:.6f} with those in "
            f"float32; at least {PARITY_COSINE} is needed: use --dtype float32"
        )


def self_test(rows: NDArray[np.float32]) -> str | None:
    """The fault of an encoder, in words, by its rows (n, d) of `synthetic` images; None if all is well."""
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        return (
            f"{bad} of {len(rows)} synthetic images have embeddings that are not finite: "
            "its weights overflow, or its preprocessing divides by nothing"
        )
    dead = int((~rows.any(axis=1)).sum())
    if 2 * dead > len(rows):  # a sound encoder may give a zero row for a black image
        return (
            f"{dead} of {len(rows)} synthetic images have embeddings that are all zero, hence no direction: "
            "its weights are dead"
        )
    return None


def _intact(rows: Tensor, stored: Tensor) -> Check:
    cosines = (normalize(rows.double()) * normalize(stored.double())).sum(1)
    least = float(cosines.nan_to_num(nan=-1.0).min())
    words = "least cosine of its canary images' embeddings to the stored ones"
    return Check("canary", words, least, CANARY_COSINE, least >= CANARY_COSINE)


def varied(figures: Figures, incumbent: Figures | None, *, share: float = VARIANCE_SHARE) -> list[Check]:
    """The checks for collapse. Floors apply with an incumbent too, unless it lies below them itself.

    `share` is the least total variance allowed, as a share of the incumbent's.
    """
    criteria = (
        ("total_variance", "total variance", VARIANCE_FLOOR, share),
        ("participation_ratio", "participation ratio", FLOOR_PARTICIPATION_RATIO, PARTICIPATION_COLLAPSE_SHARE),
        ("effective_rank", "effective rank", 0.0, PARTICIPATION_COLLAPSE_SHARE),
        ("alive_fraction", "share of its directions that are alive", 1 - MAX_DEAD_FRACTION, NUMERICAL_RANK_SHARE),
    )
    checks = []
    for name, words, floor, least in criteria:
        value = getattr(figures, name)
        limit = floor
        if incumbent is not None:
            theirs = getattr(incumbent, name)
            limit = max(least * theirs, min(floor, SAME * theirs))
        # With fewer than 32 rows some figures are unknown. With more, NaN is a fault.
        passed = not value < limit if figures.rows < MINIMUM_ROWS_PARTICIPATION else value >= limit
        checks.append(Check(name, words, value, limit, passed))
    most = max(MAX_DEAD_FRACTION, incumbent.dead_fraction if incumbent else 0.0)
    dead = figures.dead_fraction
    return [*checks, Check("dead_fraction", "share of its dimensions that are dead", dead, most, dead <= most, True)]


def _dead(figures: Figures, stored: Figures) -> tuple[Directions, ...]:
    """Ranges of directions (in log bands) that hold less than half of the variance of the stored spectrum."""
    span = min(len(figures.eigenvalues), len(stored.eigenvalues))
    ranges: list[Directions] = []
    first = 1
    for last in log_bands(span) if span else ():
        mine, theirs = (sum(it.eigenvalues[first - 1 : last]) for it in (figures, stored))
        if mine < TAIL_LOW * theirs:
            start = ranges.pop().first if ranges and ranges[-1].last == first - 1 else first
            mine, theirs = (sum(it.eigenvalues[start - 1 : last]) for it in (figures, stored))
            ranges.append(Directions(start, last, mine / theirs))
        first = last + 1
    return tuple(ranges)


def comparison(artifact: Artifact, baseline: Artifact) -> Reference | None:
    """The reference for the monitor of `artifact`: the baseline's if its dimension fits, else the artifact's own.

    The canary is always the artifact's own: it tests whether this model is intact, not whether it equals another.
    """
    if baseline.reference is None or baseline.reference.dimension != artifact.card.dimension:
        return artifact.reference
    if baseline is artifact or artifact.reference is None:
        return baseline.reference
    return replace(
        baseline.reference,
        canary=artifact.reference.canary,
        canary_participation_ratio=artifact.reference.canary_participation_ratio,
    )
