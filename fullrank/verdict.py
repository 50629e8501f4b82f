"""The verdict: one table of rules, and the short function that applies it. Pages, tickets, page and API rest on it.

An effective rank alone pages on harmless narrow traffic, which can halve it, and sleeps through half of the units
dying, which may hardly move it. The profile of band energies tells them apart: narrow traffic lowers the head and
leaves the tail near 1; a subspace that is gone puts the tail at 0; foreign images, wrong preprocessing and damaged
weights lift it. Of these three the profile cannot say which. The inputs can: a model that breaks leaves them what they
were. An alarm needs an effect beyond the threshold and significance: the jackknife bound beyond it too, or a change
that the sequential test found.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fullrank.calibration.inputs import InputReading
from fullrank.canary import Canary
from fullrank.reading import CONDITIONS, READERS, Reading
from fullrank.reference import Reference
from fullrank.rules import RULES, STATES, Case, Rule
from fullrank.statistics import WindowStatistics
from fullrank.thresholds import (
    BAND_GONE,
    CANARY_COSINE,
    NUMERICAL_RANK_SHARE,
    PARTICIPATION_COLLAPSE_SHARE,
    SIGNALS,
    TAIL_LOW,
    VARIANCE_FLOOR,
    VARIANCE_SHARE,
    thresholds,
)

__all__ = [
    "BAND_GONE",
    "CANARY_COSINE",
    "NUMERICAL_RANK_SHARE",
    "PARTICIPATION_COLLAPSE_SHARE",
    "RULES",
    "SIGNALS",
    "STATES",
    "TAIL_LOW",
    "VARIANCE_FLOOR",
    "VARIANCE_SHARE",
    "Case",
    "Change",
    "Rule",
    "Verdict",
    "diagnose",
    "judge_window",
    "thresholds",
]

MINIMUM_ROWS = 256


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


def judge(reading: Reading, windows: tuple[str, ...]) -> Verdict | None:
    """The first rule of the table, among those on `windows`, that is met; None where none is."""
    for rule in RULES:
        if rule.window not in windows:
            continue
        beyond = [seen for seen in READERS[rule.signal](reading) if reading.beyond(rule, seen)]
        if not beyond:
            continue
        worst = (min if rule.side == "below" else max)(beyond, key=lambda seen: seen.estimate)
        said = reading.said(rule.words, rule, worst)
        for case in rule.cases:
            if CONDITIONS[case.when](reading):
                return Verdict(case.state, said + reading.said(case.words, rule, worst))
        return Verdict(rule.state, said)
    return None


def canary_fault(reference: Reference | None, canary: Canary | None) -> Verdict | None:
    """What the canary alone says: None where it is intact, or not known."""
    if reference is None or canary is None:
        return None
    return judge(Reading(WindowStatistics(math.nan), reference, InputReading(), False, canary=canary), ("canary",))


def judge_window(
    window: WindowStatistics,
    reference: Reference | None,
    inputs: InputReading | None = None,
    *,
    canary_is_recent: bool = False,
) -> Verdict:
    """The verdict on the rows of one window alone, by bounds; `insufficient_data` below 256 rows in 3 groups."""
    if reference is None:
        return Verdict("insufficient_data", "there is no reference to compare with")
    if not _enough(window):
        return _too_few(window.rows + window.zeros)
    reading = Reading(window, reference, inputs or InputReading(), canary_is_recent)
    return judge(reading, ("rows", "rows, twice")) or _healthy(window, reference)


def diagnose(
    windows: Mapping[float, WindowStatistics],
    reference: Reference | None,
    canary: Canary | None = None,
    inputs: Mapping[float, InputReading] | None = None,
    change: Change | None = None,
    *,
    canary_is_recent: bool = False,
) -> Verdict:
    """The verdict on what passes now: on the rows since a change, if the sequential test found one, else on the
    shortest window that holds enough rows. Where there was a change, a collapse in the shortest window counts as well,
    and the worse of the two holds.

    inputs: how far each window's inputs are from the reference's; canary_is_recent: whether the canary was embedded
    since the rows that are judged came.
    """
    inputs = inputs or {}
    recent = canary_is_recent and canary is not None
    if (fault := canary_fault(reference, canary)) is not None:
        return fault
    if reference is None:
        return Verdict("insufficient_data", "there is no reference to compare with")
    shortest = min(windows) if windows else math.nan
    if change is not None and change.rows.rows + change.rows.zeros >= MINIMUM_ROWS:
        reading = Reading(change.rows, reference, change.inputs, recent, change.signal)
        since = judge(reading, ("rows", "rows, twice")) or _healthy(change.rows, reference)
        if not (windows and _enough(windows[shortest])):
            return since
        again = Reading(windows[shortest], reference, inputs.get(shortest, InputReading()), recent)
        later = judge(again, ("rows, twice",))
        return max((it for it in (since, later) if it), key=lambda it: STATES.index(it.state))
    for seconds in sorted(windows):
        if _enough(windows[seconds]):
            return judge_window(windows[seconds], reference, inputs.get(seconds), canary_is_recent=recent)
    return _too_few(max((w.rows + w.zeros for w in windows.values()), default=0))


def _enough(window: WindowStatistics) -> bool:
    """Whether anything can be said: enough rows, in groups that give bounds or so many zeros that none are needed."""
    return window.rows + window.zeros >= MINIMUM_ROWS and (window.bounded or window.zeros > window.rows)


def _too_few(rows: int) -> Verdict:
    return Verdict(
        "insufficient_data",
        f"the window holds {rows} rows; {MINIMUM_ROWS} in at least 3 blocks are needed before anything can be said",
    )


def _healthy(window: WindowStatistics, reference: Reference) -> Verdict:
    """Where no rule is met: healthy, unless the reference has too few rows to tell."""
    if reference.shortfall:
        return Verdict("insufficient_data", f"nothing strays over {window.rows} rows, but {reference.shortfall}")
    return Verdict(
        "healthy", f"variance, participation ratio and band profile are near the reference over {window.rows} rows"
    )
