"""From statistics to a verdict: which of the known ways of going wrong do these embeddings show?

An effective rank alone pages on harmless narrow traffic, which can halve it, and sleeps through half of the units
dying, which may hardly move it. The profile of band energies against the reference tells them apart: narrow
traffic lowers the head and leaves the tail near 1; a subspace that is gone puts the tail at 0; foreign images, wrong
preprocessing and damaged weights lift it. Of these three the profile cannot say which; the inputs can: a model that
breaks leaves them what they were. An alarm needs effect and significance: an effect size beyond the threshold, and
either the jackknife bound beyond it too or the verdict of the sequential test.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fullrank.calibration.inputs import InputReading
from fullrank.calibration.ranges import NARROW_MARGIN, Range
from fullrank.calibration.sequential import LEVEL
from fullrank.reference import Reference
from fullrank.statistics import Canary, Interval, WindowStatistics

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

# Effect sizes, as shares of the reference, for references without a calibration.
PARTICIPATION_SHARE = 0.7
PARTICIPATION_COLLAPSE_SHARE = 0.3
EFFECTIVE_RANK_SHARE = 0.7
VARIANCE_SHARE = 0.1
NUMERICAL_RANK_SHARE = 0.75
CANARY_PARTICIPATION_SHARE = 0.9
# Ratios to the reference, comparable with the exported ratios as they are.
TAIL_LOW, TAIL_HIGH, HEAD_LOW = 0.5, 2.0, 0.6
# A band this empty is gone though others behind it are not.
BAND_GONE = 0.15
CANARY_COSINE = 0.99
# Without a reference nothing is healthy, but this is collapse for any rows of length 1.
VARIANCE_FLOOR = 0.01

SIGNALS = (
    "participation_ratio",
    "participation_ratio_collapse",
    "effective_rank",
    "total_variance",
    "numerical_rank",
    "tail_energy_ratio_low",
    "tail_energy_ratio_high",
    "head_energy_ratio_low",
    "mean_shift_ratio",
    "input_distance",
    "evidence",
    "canary_cosine",
    "canary_participation_ratio",
)


@dataclass(frozen=True)
class Verdict:
    """One of `STATES`, and why in words."""

    state: str
    reason: str


@dataclass(frozen=True)
class Change:
    """What the sequential test found: the `signal` that strayed, and the statistics of the rows since it did."""

    signal: str
    rows: WindowStatistics
    inputs: InputReading


def thresholds(reference: Reference | None, rows: int = 6144) -> dict[str, float]:
    """signal -> the value, in the exported gauge's own unit, below (`*_high`, `mean_shift_ratio`, `input_distance`,
    `evidence`: above) which it counts as abnormal in a window of that many rows.

    A calibrated reference gives its own; others the shares above. NaN where the reference does not determine one:
    comparisons with it are false, in PromQL as here.
    """
    signals = dict.fromkeys(SIGNALS, math.nan) | {
        "tail_energy_ratio_low": TAIL_LOW,
        "tail_energy_ratio_high": TAIL_HIGH,
        "head_energy_ratio_low": HEAD_LOW,
        "canary_cosine": CANARY_COSINE,
        "evidence": math.nan if reference is None or reference.calibration is None else math.log10(LEVEL),
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
        signals |= {name: value for name, value in _calibrated(reference, rows).items() if math.isfinite(value)}
    return signals


def _calibrated(reference: Reference, rows: int) -> dict[str, float]:
    """Thresholds of healthy traffic, and those between narrow traffic and a broken model."""
    calibration = reference.calibration
    if calibration is None:
        return {}
    participation, rank = calibration.range("participation_ratio", rows), calibration.range("numerical_rank", rows)
    half, count = (len(reference.bands) + 1) // 2, len(reference.bands)
    tail = [calibration.range(str(i), rows) for i in range(half, count)] or [Range()]
    # One kind of input leaves some units silent; a fault has to silence half as many again, and 2 % more.
    least_rank = 1 - 1.5 * (1 - min(rank.narrow_low, 1.0)) - 0.02
    return {
        "participation_ratio": participation.low * reference.participation_ratio,
        "participation_ratio_collapse": min(
            PARTICIPATION_COLLAPSE_SHARE * reference.participation_ratio,
            participation.narrow_low / NARROW_MARGIN * reference.participation_ratio,
        ),
        "effective_rank": calibration.range("effective_rank", rows).low * reference.effective_rank,
        "numerical_rank": least_rank * reference.numerical_rank,
        "tail_energy_ratio_low": min(TAIL_LOW, *(band.narrow_low / NARROW_MARGIN for band in tail)),
        "tail_energy_ratio_high": max(max(band.narrow_high * NARROW_MARGIN, band.high) for band in tail),
        "head_energy_ratio_low": calibration.range("head", rows).low,
        "mean_shift_ratio": calibration.range("mean_shift", rows).high ** 2,
        "input_distance": calibration.range("input_distance", rows).high,
    }


def diagnose(
    windows: Mapping[float, WindowStatistics],
    reference: Reference | None,
    canary: Canary | None = None,
    inputs: Mapping[float, InputReading] | None = None,
    change: Change | None = None,
    *,
    vouched: bool = False,
) -> Verdict:
    """The verdict on the rows since a change, if the sequential test found one, else on the shortest window that holds
    enough rows, at least 256 in groups that give bounds.

    inputs: how far each window's inputs are from the reference's; vouched: whether the canary was embedded since these
    rows came, so that it speaks for the model that made them.
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
    vouched = vouched and canary is not None
    if change is not None and change.rows.rows >= MINIMUM_ROWS:
        return _Reading(change.rows, reference, change.inputs, vouched, change.signal).verdict()
    for seconds in sorted(windows):
        if windows[seconds].rows >= MINIMUM_ROWS and windows[seconds].bounded:
            reading = (inputs or {}).get(seconds, InputReading())
            return _Reading(windows[seconds], reference, reading, vouched, "").verdict()
    most = max((w.rows for w in windows.values()), default=0)
    return Verdict(
        "insufficient_data",
        f"the window holds {most} rows; {MINIMUM_ROWS} in at least 3 blocks are needed before anything can be said",
    )


class _Reading:
    """One window against the thresholds. `changed` names what the sequential test found: then estimates do, for it has
    settled significance already; else the bound must be beyond the threshold."""

    def __init__(
        self, window: WindowStatistics, reference: Reference, inputs: InputReading, vouched: bool, changed: str
    ) -> None:
        self.window, self.reference, self.changed, self.vouched = window, reference, changed, vouched
        self.limit = thresholds(reference, window.rows)
        self.n = f"over {window.rows} rows"
        self.inputs = inputs
        # Between alike and different is a stretch where the inputs say nothing. NaN is neither.
        usual = Range() if reference.calibration is None else reference.calibration.range("input_distance", window.rows)
        self.inputs_alike = inputs.distance <= (usual.low + 3 * usual.high) / 4
        self.inputs_differ = inputs.distance > usual.high
        self.usual = usual

    def below(self, interval: Interval, signal: str) -> bool:
        return (interval.estimate if self.changed else interval.upper) < self.limit[signal]

    def above(self, interval: Interval, signal: str) -> bool:
        return (interval.estimate if self.changed else interval.lower) > self.limit[signal]

    def verdict(self) -> Verdict:
        """Collapse first, unless the inputs excuse it; then what only the inputs can settle."""
        collapse = self._collapse()
        return (
            (collapse and self._excuse(collapse))
            or collapse
            or self._deviation()
            or Verdict("healthy", f"variance, participation ratio and band profile are near the reference {self.n}")
        )

    def _collapse(self) -> Verdict | None:
        window, limit = self.window, self.limit
        if window.total_variance < limit["total_variance"]:
            return Verdict(
                "complete_collapse",
                f"total variance {window.total_variance:.3g} is below {limit['total_variance']:.3g} {self.n}: "
                "all embeddings lie near one point",
            )
        # n rows span at most n - 1 directions, however healthy.
        share = limit["numerical_rank"] / max(1, self.reference.numerical_rank)
        expected = min(limit["numerical_rank"], share * (window.rows - 1))
        if window.numerical_rank < expected:
            return Verdict(
                "dimensional_collapse",
                f"only {window.numerical_rank} directions carry variance {self.n}; "
                f"the reference has {self.reference.numerical_rank}",
            )
        tail = window.tail
        gone = [band for band in tail if (band.ratio.estimate if self.changed else band.ratio.upper) < BAND_GONE]
        if tail and self.below(tail[-1].ratio, "tail_energy_ratio_low"):
            gone.append(tail[-1])
        if not gone:
            return None
        worst = min(gone, key=lambda band: band.ratio.estimate)
        return Verdict(
            "dimensional_collapse",
            f"directions {worst.first} to {worst.last} hold {worst.ratio.estimate:.2f} of their reference variance "
            f"(at most {worst.ratio.upper:.2f}) {self.n}: "
            + (
                "all directions have shrunk"
                if self.below(window.head, "head_energy_ratio_low")
                else "a subspace is gone"
            ),
        )

    def _excuse(self, collapse: Verdict) -> Verdict | None:
        """Inputs that a healthy encoder too puts in one place or into few directions: all but one picture, or images of
        no kind it knows. One kind of healthy input alone is no such excuse, so they must be beyond all of these."""
        if collapse.state == "complete_collapse" and self.inputs.variance_ratio < VARIANCE_SHARE:
            return Verdict("traffic_narrowed", f"the inputs are all but one and the same {self.n}")
        distance, narrow = self.inputs.distance, self.usual.narrow_high
        if not distance > NARROW_MARGIN * narrow:
            return None
        return Verdict(
            "traffic_shifted",
            f"{collapse.reason}; but the inputs are {distance:.1f} from the reference's, where one kind of healthy "
            f"input alone reaches {narrow:.1f}: images of another kind altogether, on which no model can be judged",
        )

    def _deviation(self) -> Verdict | None:
        window, limit, participation = self.window, self.limit, self.window.participation_ratio
        what, narrower, lifted = "", False, False
        rising = [band for band in window.tail if self.above(band.ratio, "tail_energy_ratio_high")]
        if rising:
            worst = max(rising, key=lambda band: band.ratio.estimate)
            lifted = True
            what = f"directions {worst.first} to {worst.last} hold {worst.ratio.estimate:.1f} times their variance"
        elif self.below(window.head, "head_energy_ratio_low"):
            narrower = True
            what = f"the leading directions hold {window.head.estimate:.2f} of their reference variance"
        elif self.below(participation, "participation_ratio"):
            narrower = True
            what = (
                f"the participation ratio is {participation.estimate:.1f} of {self.reference.participation_ratio:.1f}"
            )
        elif window.mean_shift_ratio > limit["mean_shift_ratio"]:
            what = f"the mean has moved by {window.mean_shift_ratio:.2f} of the reference's variance"
        elif self.changed:
            what = f"{self.changed} has strayed from what healthy traffic does"
        if not what:
            return None
        what = f"{what} {self.n}"
        smaller = self.below(participation, "participation_ratio_collapse")
        if self.inputs_alike and not self.vouched:
            state = "dimensional_collapse" if smaller else "model_fault"
            return Verdict(state, f"{what}, while the inputs are what they were: the model or its preprocessing")
        if lifted and smaller and not self.inputs_differ:
            return Verdict(
                "dimensional_collapse",
                f"{what} while the participation ratio is {participation.estimate:.1f} of "
                f"{self.reference.participation_ratio:.1f}: another, smaller subspace",
            )
        if narrower:
            return Verdict("traffic_narrowed", f"{what} with every direction alive: the traffic is less varied")
        if self.inputs_alike:
            return Verdict("traffic_shifted", f"{what}; the canary is intact: images of a kind thumbnails do not tell")
        known = ", and the inputs differ too" if self.inputs_differ else ""
        return Verdict("traffic_shifted", f"{what}{known}: foreign images or changed preprocessing")
