"""The papers' claims that the table of methods is held against, and what a claim makes of the runs."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._methods_configurations import (
    BARE,
    EAGER,
    HARDER,
    LARGER,
    LONGER,
    LOW_RATE,
    OPTIMAL,
    TRAINED,
    TWINS,
)
from benchmarks._page import mean_and_error

Record = dict[str, Any]
UNMEASURED = "not measured"
RERUN = 1.8
"""Points of the probe that two runs of the same recipe and seed lie apart when they differ by rounding alone, as a root
mean square over 19 pairs (docs/measured/methods.md). Runs of two methods lie as far apart by chance."""


@dataclass(frozen=True)
class Claim:
    """What a paper says: `metric` of the first is above that of the second, or at most `tolerance` points below it."""

    says: str
    source: str
    metric: Callable[[Record], float]
    first: str
    second: str
    tolerance: float | None = None

    def tells(self, record: Record) -> bool:
        """Whether the run ended and measured what the claim is about; the first runs counted no dead dimensions."""
        return "error" not in record and (self.metric not in (dead_h, dead_z) or "dead" in record["z"])

    def bar(self, records: Sequence[Record]) -> float | None:
        """The better untrained twin's mean accuracy; None for a claim that is not about accuracy."""
        if self.metric not in ACCURACIES:
            return None
        found = [[self.metric(r) for r in records if r["name"] == name] for name in TWINS.values()]
        return max((statistics.fmean(values) for values in found if values), default=None)

    def sides(self, records: Sequence[Record]) -> tuple[dict[int, float], dict[int, float]]:
        """The metric of the first and of the second, by seed."""
        first, second = (
            {r["seed"]: self.metric(r) for r in records if r["name"] == name and self.tells(r)}
            for name in (self.first, self.second)
        )
        return first, second

    def seeds(self, records: Sequence[Record]) -> list[int]:
        """The seeds of which both sides are measured."""
        first, second = self.sides(records)
        return sorted(first.keys() & second.keys())

    def verdict(self, records: Sequence[Record]) -> str:
        said, judged = self.read(records)
        return f"{said}: {judged}" if said else UNMEASURED

    def read(self, records: Sequence[Record]) -> tuple[str, str]:
        """Both sides' means and their gap, and what they make of the claim. Empty where no seed has both sides."""
        a, b = self.sides(records)
        seeds = self.seeds(records)
        if not seeds:
            return "", ""
        first, second = (statistics.fmean(values[seed] for seed in seeds) for values in (a, b))
        gaps = [a[seed] - b[seed] for seed in seeds]
        gap = statistics.fmean(gaps)
        said = f"{first:.3g} against {second:.3g}"
        if self.metric in ACCURACIES:
            said += f" ({mean_and_error(gaps, 1)})"
        bar = self.bar(records)
        # To be level with what an untrained network beats is no merit; for an order one side above it is enough.
        if bar is not None and (second if self.tolerance is not None else max(first, second)) <= bar:
            which = "both" if max(first, second) <= bar else "the second"
            return said, f"not counted, {which} below the untrained twin's {bar:.3g}"
        if self.tolerance is not None:
            doubt, least = chance(gaps), -self.tolerance
            if gap - doubt < least <= gap + doubt:
                return said, f"**unclear**, chance alone makes gaps of {doubt:.1f}"
            seen = gap >= least
        elif min(gaps) <= 0 < max(gaps):
            return said, "**unclear**, the seeds disagree"
        elif self.metric in ACCURACIES and abs(gap) < chance(gaps):
            return said, f"**unclear**, chance alone makes gaps of {chance(gaps):.1f}"
        else:
            seen = gap > 0
        return said, "seen" if seen else "**not seen**"


def chance(gaps: Sequence[float]) -> float:
    """Points of a mean gap, by seed `gaps`, that chance may make: twice its standard error, by these and by RERUN."""
    errors = [RERUN / math.sqrt(len(gaps))]
    if len(gaps) > 1:
        errors.append(statistics.stdev(gaps) / math.sqrt(len(gaps)))
    return 2 * max(errors)


def knn(record: Record) -> float:
    return 100 * float(record["knn"])


def linear(record: Record) -> float:
    return 100 * float(record["linear"])


def one_percent(record: Record) -> float:
    return 100 * float(record["finetune_one_percent"])


def ten_percent(record: Record) -> float:
    return 100 * float(record["finetune_ten_percent"])


ACCURACIES = (knn, linear, one_percent, ten_percent)


def rank_h(record: Record) -> float:
    return float(record["h"]["effective_rank"])


def share_z(record: Record) -> float:
    return float(record["z"]["effective_rank"]) / int(record["z"]["dimension"])


def variance_z(record: Record) -> float:
    return float(record["z"]["total_variance"])


def variance_h(record: Record) -> float:
    return float(record["h"]["total_variance"])


def alignment(record: Record) -> float:
    return float(record["alignment"])


def dead_h(record: Record) -> float:
    return float(record["h"]["dead"])


def dead_z(record: Record) -> float:
    return float(record["z"]["dead"])


CLAIMS = [
    Claim("DirectCLR's z uses a larger share of its dimensions than SimCLR's", "Jing", share_z, "DirectCLR", "SimCLR"),
    Claim("rank of h: DirectCLR over no projector", "Jing", rank_h, "DirectCLR", BARE),
    Claim("rank of h: a projector over none", "Jing", rank_h, "SimCLR", BARE),
    Claim("linear probe: a projector over none", "Jing", linear, "SimCLR", BARE),
    Claim("linear probe: DirectCLR over no projector", "Jing", linear, "DirectCLR", BARE),
    Claim("linear probe: DirectCLR over a linear projector", "Jing", linear, "DirectCLR", "SimCLR, linear projector"),
    Claim("linear probe: a 2-layer projector over DirectCLR", "Jing", linear, "SimCLR", "DirectCLR"),
    *(
        Claim(f"{what}: {name} over {name} without {part}", "Tian; Chen & He", metric, name, f"{name}, no {part}")
        for name in ("BYOL", "SimSiam")
        for part in ("stop-gradient", "predictor")
        for what, metric in (("variance of z", variance_z), ("kNN", knn))
    ),
    *(
        claim
        for rate in ("", LOW_RATE)
        for claim in (
            Claim(
                f"linear probe: DirectPred over a trained linear predictor{rate}",
                "Tian",
                linear,
                "DirectPred" + rate,
                TRAINED + rate,
            ),
            Claim(
                f"linear probe: DirectPred over the optimal predictor{rate}",
                "Tian",
                linear,
                "DirectPred" + rate,
                OPTIMAL + rate,
            ),
            Claim(
                f"linear probe: DirectCopy at most 2 points below DirectPred{rate}",
                "Wang",
                linear,
                "DirectCopy" + rate,
                "DirectPred" + rate,
                2,
            ),
        )
    ),
]


CLAIMS.append(
    Claim("linear probe: DirectPred at most 2 points below BYOL's two layers", "Tian", linear, "DirectPred", "BYOL", 2)
)
CLAIMS += [
    *(
        Claim(f"dead dimensions of z: SimCLR over the twin with {which} statistics", "Jing", dead_z, "SimCLR", twin)
        for which, twin in TWINS.items()
    ),
    Claim("dead dimensions of h: no projector over a projector", "Jing", dead_h, BARE, "SimCLR"),
    Claim("linear probe: Barlow Twins over SimCLR", "Zbontar", linear, "Barlow Twins", "SimCLR"),
    Claim("linear probe: Barlow Twins at most 2 points below BYOL", "Zbontar", linear, "Barlow Twins", "BYOL", 2),
]

REASONS = [
    Claim("longer, rank of h: a projector over none", "time", rank_h, "SimCLR" + LONGER, BARE + LONGER),
    Claim("longer, no projector: the rank of h falls", "time", rank_h, BARE, BARE + LONGER),
    Claim("hard crops, rank of h: a projector over none", "augmentation", rank_h, "SimCLR" + HARDER, BARE + HARDER),
    Claim("hard crops, no projector: the rank of h falls", "augmentation", rank_h, BARE, BARE + HARDER),
    Claim("longer, probe: DirectPred over trained", "time", linear, "DirectPred" + LONGER, TRAINED + LONGER),
    Claim("longer, probe: DirectPred over optimal", "time", linear, "DirectPred" + LONGER, OPTIMAL + LONGER),
    Claim("probe: DirectPred over trained fast", "learning rate", linear, "DirectPred", TRAINED + EAGER),
    Claim("as many steps, probe: SimCLR as at batch 64", "steps", linear, LARGER[0] + LONGER, "SimCLR", 2),
    Claim("as many steps, probe: Barlow Twins too", "steps", linear, LARGER[1] + LONGER, "Barlow Twins", 2),
]
