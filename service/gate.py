"""Is an encoder collapsed? Judged on canary images before it serves, against the incumbent or against floors.

An encoder's own reference describes whatever it is, so a collapsed encoder looks normal to itself; hence the incumbent.
The service's swap and `fullrank check` share this judgement.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fullrank import Moments, Reference, measures
from fullrank.diagnosis import PARTICIPATION_COLLAPSE_SHARE, VARIANCE_FLOOR, VARIANCE_SHARE
from models.artifact import Artifact
from models.embedder import Embedder, normalize

FLOOR_PARTICIPATION_RATIO = 3.0
MAX_DEAD_FRACTION = 0.5


@dataclass(frozen=True)
class Figures:
    """The geometry of one encoder's L2-normalised embeddings of the canary images."""

    rows: int
    dimension: int
    participation_ratio: float  # unbiased; NaN below 32 rows
    effective_rank: float  # plug-in: compared only between encoders on the same images
    total_variance: float
    dead_fraction: float  # of the coordinates, those that vary less than the serving precision rounds

    @classmethod
    def of(cls, rows: Tensor, dtype: torch.dtype = torch.float32) -> "Figures":
        """rows (m, d), normalised or not, embedded with `dtype`."""
        rows = normalize(rows.double())
        moments = Moments(rows.shape[1])
        moments.add(rows)
        variances = rows.var(dim=0)
        eigenvalues = torch.linalg.eigvalsh(moments.covariance())
        return cls(
            rows=len(rows),
            dimension=rows.shape[1],
            participation_ratio=moments.participation_ratio(),
            effective_rank=measures.effective_rank(eigenvalues),
            total_variance=float(variances.sum()),
            dead_fraction=float((variances <= measures.noise_floor(dtype, rows.shape[1])).double().mean()),
        )


@dataclass(frozen=True)
class Judgement:
    """`passed` with its reason in words, and the figures behind it; incumbent is None when floors were used."""

    passed: bool
    reason: str
    candidate: Figures | None = None
    incumbent: Figures | None = None


def judge(embedder: Embedder, candidate: Artifact, against: Artifact | None = None) -> Judgement:
    """Judge `candidate`, ready to run as `embedder`, on the incumbent's canary images, else on its own."""
    incumbent = against if against is not None and against.canary is not None else None
    canary = incumbent.canary if incumbent is not None else candidate.canary
    if canary is None:
        return Judgement(False, "there are no canary images to judge by; store a reference with the encoder")
    figures = Figures.of(embedder.embed_arrays(canary.images), embedder.dtype)
    baseline = None if incumbent is None else Figures.of(canary.embeddings, embedder.dtype)
    faults = list(_faults(figures, baseline))
    reason = "; ".join(faults) if faults else "as varied as it should be"
    return Judgement(not faults, reason, figures, baseline)


def _faults(figures: Figures, incumbent: Figures | None) -> list[str]:
    faults = []
    if figures.dead_fraction > max(MAX_DEAD_FRACTION, incumbent.dead_fraction if incumbent else 0.0):
        faults.append(f"{figures.dead_fraction:.0%} of its dimensions are dead")
    if incumbent is None:
        if figures.total_variance < VARIANCE_FLOOR:
            faults.append(f"total variance {figures.total_variance:.2g} is below {VARIANCE_FLOOR}")
        if figures.participation_ratio < FLOOR_PARTICIPATION_RATIO:
            faults.append(f"participation ratio {figures.participation_ratio:.2f} is below {FLOOR_PARTICIPATION_RATIO}")
        return faults
    for name, least in (
        ("total_variance", VARIANCE_SHARE),
        ("participation_ratio", PARTICIPATION_COLLAPSE_SHARE),
        ("effective_rank", PARTICIPATION_COLLAPSE_SHARE),
    ):
        mine, theirs = getattr(figures, name), getattr(incumbent, name)
        if mine < least * theirs:
            words = name.replace("_", " ")
            faults.append(
                f"{words} {mine:.3g} is {mine / theirs:.0%} of the incumbent's {theirs:.3g} (least: {least:.0%})"
            )
    return faults


def comparison(artifact: Artifact, baseline: Artifact) -> Reference | None:
    """What the monitor of `artifact` compares recent traffic with: the baseline's reference if it fits, else its own.

    The canary stays the artifact's own: it asks whether this model is intact, not whether it is that other one.
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
