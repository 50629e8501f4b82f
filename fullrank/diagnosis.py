"""From statistics to a verdict: which of the known ways of going wrong do these embeddings show?

An effective rank alone pages on harmless narrow traffic, which can halve it, and sleeps through half of the units
dying, which may hardly move it. The profile of band energies against the reference tells them apart: narrow
traffic lowers the head and leaves the tail near 1; a subspace that is gone puts the tail at 0; foreign images, wrong
preprocessing and damaged weights lift it. An alarm needs effect and significance: an effect size beyond the
threshold, at the jackknife bound and not only at the estimate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fullrank.reference import Reference
from fullrank.statistics import Canary, WindowStatistics

STATES = (
    "insufficient_data",
    "healthy",
    "traffic_narrowed",
    "traffic_shifted",
    "dimensional_collapse",
    "complete_collapse",
    "model_fault",
)

MINIMUM_ROWS = 256

# Effect sizes, as shares of the reference.
PARTICIPATION_SHARE = 0.7
PARTICIPATION_COLLAPSE_SHARE = 0.3
EFFECTIVE_RANK_SHARE = 0.7
VARIANCE_SHARE = 0.1
NUMERICAL_RANK_SHARE = 0.75
CANARY_PARTICIPATION_SHARE = 0.9
# Ratios to the reference, comparable with the exported ratios as they are.
TAIL_LOW, TAIL_HIGH, HEAD_LOW = 0.5, 2.0, 0.6
CANARY_COSINE = 0.99
# Without a reference nothing is healthy, but this is collapse for any rows of length 1.
VARIANCE_FLOOR = 0.01


@dataclass(frozen=True)
class Verdict:
    """One of `STATES`, and why in words."""

    state: str
    reason: str


def thresholds(reference: Reference | None) -> dict[str, float]:
    """signal -> the value, in the exported gauge's own unit, below (`*_high`: above) which it counts as abnormal.

    NaN where the reference does not determine one: comparisons with it are false, in PromQL as here.
    """
    signals = dict.fromkeys(SIGNALS, math.nan) | {
        "tail_energy_ratio_low": TAIL_LOW,
        "tail_energy_ratio_high": TAIL_HIGH,
        "head_energy_ratio_low": HEAD_LOW,
        "canary_cosine": CANARY_COSINE,
        "total_variance": VARIANCE_FLOOR,
    }
    if reference is not None:
        signals |= {
            "participation_ratio": PARTICIPATION_SHARE * reference.participation_ratio,
            "participation_ratio_collapse": PARTICIPATION_COLLAPSE_SHARE * reference.participation_ratio,
            "effective_rank": EFFECTIVE_RANK_SHARE * reference.effective_rank,
            "total_variance": VARIANCE_SHARE * reference.total_variance,
            "numerical_rank": NUMERICAL_RANK_SHARE * reference.numerical_rank,
            "canary_participation_ratio": CANARY_PARTICIPATION_SHARE * reference.canary_participation_ratio,
        }
    return signals


SIGNALS = (
    "participation_ratio",
    "participation_ratio_collapse",
    "effective_rank",
    "total_variance",
    "numerical_rank",
    "tail_energy_ratio_low",
    "tail_energy_ratio_high",
    "head_energy_ratio_low",
    "canary_cosine",
    "canary_participation_ratio",
)


def diagnose(
    windows: Mapping[float, WindowStatistics], reference: Reference | None, canary: Canary | None = None
) -> Verdict:
    """The verdict on the shortest window that holds enough rows, at least 256 in groups that give bounds.

    Precedence: model_fault > complete_collapse > dimensional_collapse > traffic_shifted > traffic_narrowed > healthy.
    """
    limit = thresholds(reference)
    if canary is not None:
        # Written so that a NaN, which no healthy encoder gives, is a fault.
        if not canary.cosine_min >= limit["canary_cosine"]:
            return Verdict(
                "model_fault",
                f"a canary image now embeds at cosine {canary.cosine_min:.4f} to its stored embedding; "
                f"{limit['canary_cosine']:g} is the least expected: the model or its preprocessing has changed",
            )
        if canary.participation_ratio < limit["canary_participation_ratio"]:
            return Verdict(
                "model_fault",
                f"the canary images' participation ratio is {canary.participation_ratio:.1f}, "
                f"below {limit['canary_participation_ratio']:.1f}",
            )
    if reference is None:
        return Verdict("insufficient_data", "there is no reference to compare with")
    for seconds in sorted(windows):
        if windows[seconds].rows >= MINIMUM_ROWS and windows[seconds].bounded:
            return _read(windows[seconds], limit, reference)
    most = max((w.rows for w in windows.values()), default=0)
    return Verdict(
        "insufficient_data",
        f"the window holds {most} rows; {MINIMUM_ROWS} in at least 3 blocks are needed before anything can be said",
    )


def _read(window: WindowStatistics, limit: Mapping[str, float], reference: Reference) -> Verdict:
    n = f"over {window.rows} rows"
    if window.total_variance < limit["total_variance"]:
        return Verdict(
            "complete_collapse",
            f"total variance {window.total_variance:.3g} is below {limit['total_variance']:.3g} {n}: "
            "all embeddings lie near one point",
        )
    dead = [band for band in window.tail if band.ratio.upper < limit["tail_energy_ratio_low"]]
    if dead:
        worst = min(dead, key=lambda band: band.ratio.estimate)
        return Verdict(
            "dimensional_collapse",
            f"directions {worst.first} to {worst.last} hold {worst.ratio.estimate:.2f} of their reference variance "
            f"(at most {worst.ratio.upper:.2f}) {n}: a subspace is gone",
        )
    # n rows span at most n - 1 directions, however healthy.
    expected = min(limit["numerical_rank"], NUMERICAL_RANK_SHARE * (window.rows - 1))
    if window.numerical_rank < expected:
        return Verdict(
            "dimensional_collapse",
            f"only {window.numerical_rank} directions carry variance {n}; the reference has {reference.numerical_rank}",
        )
    lifted = [band for band in window.tail if band.ratio.lower > limit["tail_energy_ratio_high"]]
    if lifted:
        worst = max(lifted, key=lambda band: band.ratio.estimate)
        what = f"directions {worst.first} to {worst.last} hold {worst.ratio.estimate:.1f} times their variance {n}"
        if window.participation_ratio.upper < limit["participation_ratio_collapse"]:
            return Verdict(
                "dimensional_collapse",
                f"{what} while the participation ratio is {window.participation_ratio.estimate:.1f} of "
                f"{reference.participation_ratio:.1f}: another, smaller subspace",
            )
        return Verdict("traffic_shifted", f"{what}: foreign images or changed preprocessing")
    if window.head.upper < limit["head_energy_ratio_low"]:
        return Verdict(
            "traffic_narrowed",
            f"the leading directions hold {window.head.estimate:.2f} of their reference variance {n}, "
            "the trailing ones are intact: the traffic is less varied",
        )
    if window.participation_ratio.upper < limit["participation_ratio"]:
        return Verdict(
            "traffic_narrowed",
            f"the participation ratio is {window.participation_ratio.estimate:.1f} of "
            f"{reference.participation_ratio:.1f} {n} with every direction alive: the traffic is less varied",
        )
    return Verdict("healthy", f"variance, participation ratio and band profile are near the reference {n}")
