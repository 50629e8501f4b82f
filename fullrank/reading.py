"""What the verdict's rules ask of a window: the values of their signals, and the conditions of their exceptions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fullrank.bounds import Interval
from fullrank.calibration.inputs import InputReading
from fullrank.calibration.ranges import NARROW_MARGIN, Range
from fullrank.canary import Canary
from fullrank.reference import Reference
from fullrank.rules import Rule
from fullrank.statistics import Band, WindowStatistics
from fullrank.thresholds import VARIANCE_SHARE, thresholds

# Inputs that shrank excuse rows that shrank, down to these shares of what the inputs keep. An intact canary lets other
# inputs excuse a variance down to the second: one answer to all, from a cache that the canary passes by, leaves less.
EXCUSED_BAND_SHARE = 0.5
EXCUSED_VARIANCE_SHARE = 0.03
# Rows of which so many are copies repeat; a model that collapsed as well leaves fewer directions than this share.
REPEATED_SHARE = 0.5
# Where more of the sampled rows are copies, m independent rows are left. The mean then moves by about 1/m of the
# variance along each direction, and by some times that where the image that comes often is an unusual one.
SOME_REPEAT = 0.05
COPIES_REACH = 6.0
SPANNED_SHARE = 0.5
# Inputs of which a band is below this have shrunk.
INPUTS_SHRUNK = 0.5
# In fewer directions rows of a short dtype agree by chance.
LEAST_DIRECTIONS = 3
# Variance of 8-bit pixels' means that is rounding and nothing else, as a share of the reference's.
INPUT_ROUNDING = 1e-9


@dataclass(frozen=True)
class Seen:
    """A value of a signal, with its bounds where it has any; `first` to `last` are the directions of a band."""

    lower: float
    estimate: float
    upper: float
    first: int = 0
    last: int = 0


class Reading:
    """One window, and all that a rule may ask about it. `changed` names what the sequential test found, or is empty.

    canary_is_recent: whether the canary was embedded since these rows came and is intact, so that it vouches for their
    model.
    """

    def __init__(
        self,
        window: WindowStatistics,
        reference: Reference,
        inputs: InputReading,
        canary_is_recent: bool,
        changed: str = "",
        canary: Canary | None = None,
    ) -> None:
        self.window = window
        self.reference = reference
        self.inputs = inputs
        self.canary_is_recent = canary_is_recent
        self.changed = changed
        self.canary = canary
        self.limit = thresholds(reference, window.rows)
        calibration = reference.calibration
        self.usual = Range() if calibration is None else calibration.range("input_distance", window.rows)
        self.usual_texture = Range() if calibration is None else calibration.range("texture_shift", window.rows)

    def beyond(self, rule: Rule, seen: Seen) -> bool:
        """Whether a value is beyond the rule's threshold; NaN, unknown, never is."""
        limit = self.limit[rule.threshold]
        certain = rule.reading == "estimate" or bool(self.changed)
        if rule.side == "below":
            return (seen.estimate if certain else seen.upper) < limit
        return (seen.estimate if certain else seen.lower) > limit

    def ratio_collapsed(self) -> bool:
        """Whether the participation ratio is lower than one kind of healthy input alone makes it."""
        ratio = self.window.participation_ratio
        return (ratio.estimate if self.changed else ratio.upper) < self.limit["participation_ratio_collapse"]

    def inputs_usual(self) -> bool:
        """Whether the inputs are within half of the way to their threshold, and their textures to theirs, if known. NaN
        is neither usual nor different."""
        rough = self.inputs.texture_shift > _half_way(self.usual_texture)
        return self.inputs.distance <= _half_way(self.usual) and not rough

    def inputs_differ(self) -> bool:
        """Whether the inputs are beyond their threshold, or their textures beyond theirs."""
        rough = self.inputs.texture_shift > self.usual_texture.high
        return self.inputs.distance > self.usual.high or rough

    def inputs_foreign(self) -> bool:
        """Whether they are a quarter farther away than one kind of healthy input alone reaches.

        Of textures nothing is asked: another file format changes them, and excuses no collapse.
        """
        return self.inputs.distance > NARROW_MARGIN * self.usual.narrow_high

    def inputs_are_one_picture(self) -> bool:
        """Whether the inputs hardly vary, and the rows have not lost far more of their variance than the inputs."""
        kept = max(0.0, self.inputs.variance_ratio - INPUT_ROUNDING)
        share = self.window.total_variance / self.reference.total_variance
        return self.inputs.variance_ratio < VARIANCE_SHARE and share >= EXCUSED_VARIANCE_SHARE * kept

    def variance_is_left(self) -> bool:
        """Whether rows differ more than those of a cache or buffer that gives nearly one answer to all."""
        return self.window.total_variance >= EXCUSED_VARIANCE_SHARE * self.reference.total_variance

    def inputs_shrank_as_much(self) -> bool:
        """Whether inputs shrank, as near-copies make them, and all of the rows' bands with them but no further."""
        if not (self.inputs.weakest_band < INPUTS_SHRUNK and self.all_shrank()):
            return False
        ratios = [band.ratio.estimate for band in self.window.bands]
        return min(ratios) >= EXCUSED_BAND_SHARE * self.inputs.weakest_band

    def rows_repeat(self) -> bool:
        """Whether most rows are copies, and those that differ span at least half of what so many can span."""
        sample = self.window.sample
        spanned = min(sample.distinct_rows - 1, self.reference.numerical_rank)
        repeated = sample.copies_share > REPEATED_SHARE and spanned > 0
        return repeated and self.window.numerical_rank >= SPANNED_SHARE * spanned

    def copies_move_it_as_far(self) -> bool:
        """Whether rows repeat, and the mean moved along the tail no further than such repetitions can move it."""
        window = self.window
        far = window.tail_shift > COPIES_REACH / window.independent_rows
        return window.sample.copies_share > SOME_REPEAT and not far

    def all_shrank(self) -> bool:
        """Whether the head bands hold too little as well."""
        head = self.window.head
        return (head.estimate if self.changed else head.upper) < self.limit["head_energy_ratio_low"]

    def said(self, words: str, rule: Rule, seen: Seen) -> str:
        """The words of a rule or a case, with the figures."""
        return words.format(
            seen=seen,
            limit=self.limit[rule.threshold],
            window=self.window,
            reference=self.reference,
            inputs=self.inputs,
            sample=self.window.sample,
            usual=self.usual,
            changed=self.changed,
            ratio=self.window.participation_ratio.estimate,
            n=f"over {self.window.rows} rows",
            neighbours=self._neighbours(),
            shape="all directions have shrunk" if self.all_shrank() else "a subspace is gone",
        )

    def _neighbours(self) -> str:
        """What the canary says a search has lost."""
        if self.canary is None or math.isnan(self.canary.neighbours_overlap):
            return ""
        return f"; {self.canary.neighbours_overlap:.0%} of its nearest neighbours are what they were"


def _half_way(usual: Range) -> float:
    """Half of the way from the middle of a range to its upper end."""
    return (usual.low + 3 * usual.high) / 4


CONDITIONS: dict[str, Callable[[Reading], bool]] = {
    "": lambda _: True,
    "rows repeat": Reading.rows_repeat,
    "copies move it as far": Reading.copies_move_it_as_far,
    "inputs are foreign": Reading.inputs_foreign,
    "inputs are one picture": Reading.inputs_are_one_picture,
    "inputs shrank as much": Reading.inputs_shrank_as_much,
    "inputs are usual": Reading.inputs_usual,
    "inputs differ": Reading.inputs_differ,
    "inputs differ, recent canary": lambda it: it.inputs_differ() and it.canary_is_recent,
    "inputs differ, recent canary, variance left": lambda it: (
        it.inputs_differ() and it.canary_is_recent and it.variance_is_left()
    ),
    "inputs are usual, no recent canary": lambda it: it.inputs_usual() and not it.canary_is_recent,
    "inputs are usual, ratio collapsed, no recent canary": lambda it: (
        it.inputs_usual() and it.ratio_collapsed() and not it.canary_is_recent
    ),
    "not calibrated": lambda it: it.reference.calibration is None,
    "ratio collapsed, not calibrated": lambda it: (
        it.reference.calibration is None and it.ratio_collapsed() and not it.inputs_differ()
    ),
    "ratio collapsed, inputs not known to differ": lambda it: it.ratio_collapsed() and not it.inputs_differ(),
}


def _plain(value: float) -> tuple[Seen, ...]:
    return (Seen(value, value, value),)


def _interval(interval: Interval) -> tuple[Seen, ...]:
    return (Seen(interval.lower, interval.estimate, interval.upper),)


def _bands(bands: tuple[Band, ...]) -> tuple[Seen, ...]:
    return tuple(Seen(band.ratio.lower, band.ratio.estimate, band.ratio.upper, band.first, band.last) for band in bands)


def _canary_cosine(it: Reading) -> tuple[Seen, ...]:
    """NaN, which no healthy encoder gives, is the least cosine there is."""
    if it.canary is None:
        return ()
    cosine = it.canary.cosine_min
    return _plain(-1.0 if math.isnan(cosine) else cosine)


def _shared_answers(it: Reading) -> tuple[Seen, ...]:
    """Unknown where healthy rows have so few directions that two may agree in all digits by chance."""
    enough = it.reference.participation_ratio >= LEAST_DIRECTIONS
    return _plain(it.window.sample.shared_answers) if enough else ()


def _input_correlation(it: Reading) -> tuple[Seen, ...]:
    """Known of usual inputs only: of others no healthy value is."""
    return _interval(it.window.sample.input_correlation) if it.inputs_usual() else ()


def _numerical_rank(it: Reading) -> tuple[Seen, ...]:
    """As if the rows sufficed to span the reference's directions: n rows span n - 1, however healthy."""
    share = (it.window.rows - 1) / max(1, it.reference.numerical_rank)
    return _plain(it.window.numerical_rank / min(1.0, share)) if it.window.rows > 1 else ()


READERS: dict[str, Callable[[Reading], tuple[Seen, ...]]] = {
    "canary's least cosine": _canary_cosine,
    "canary's largest angle": lambda it: () if it.canary is None else _plain(it.canary.angle_degrees),
    "canary's participation ratio": lambda it: () if it.canary is None else _plain(it.canary.participation_ratio),
    "share of rows that are zero": lambda it: _plain(it.window.zero_share),
    "total variance": lambda it: _plain(it.window.total_variance),
    "answers shared by inputs that differ": _shared_answers,
    "numerical rank": _numerical_rank,
    "any tail band": lambda it: _bands(it.window.tail),
    "last tail band": lambda it: _bands(it.window.tail[-1:]),
    "head bands together": lambda it: _interval(it.window.head),
    "participation ratio": lambda it: _interval(it.window.participation_ratio),
    "shift of the mean in the tail": lambda it: _plain(it.window.tail_shift),
    "shift of the mean": lambda it: _plain(it.window.mean_shift_ratio),
    "correlation of answers and inputs": _input_correlation,
    "evidence of the sequential test": lambda it: _plain(math.inf if it.changed else math.nan),
}
