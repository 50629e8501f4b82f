"""Snapshots of a ring of blocks: each window measured as often as it changes, one window's eigenvalues at a time."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from fullrank.calibration.inputs import InputReading
from fullrank.calibration.sequential import Evidence
from fullrank.moments import Moments, merge
from fullrank.monitor.snapshot import Counters, Snapshot
from fullrank.monitor.window import Block, Ring
from fullrank.reference import Reference
from fullrank.rows import unit
from fullrank.statistics import Canary, WindowStatistics, measure
from fullrank.verdict import Change, diagnose, thresholds

# A refresh that takes long is made more rarely: at most this share of one core goes into refreshing.
_DUTY = 0.05
# Each window is measured this many times in its own length.
_TIMES_A_WINDOW = 30
# Stands among the windows' seconds for the rows since the change that the sequential test found.
_SINCE = 0.0


class Refresher:
    """Makes the snapshots of one monitor; windows: seconds, rising. One thread at a time."""

    def __init__(
        self, dimension: int, reference: Reference | None, windows: Sequence[float], clock: Callable[[], float]
    ) -> None:
        self._dimension, self._reference, self._windows, self._clock = dimension, reference, tuple(windows), clock
        self._canary: Canary | None = None
        self._canary_time = -math.inf
        self._measured: dict[float, WindowStatistics] = {}
        self._due = dict.fromkeys(self._windows, -math.inf) | {_SINCE: math.inf}
        self._rested = -math.inf
        self._change = math.nan
        # What is known of the latest so many blocks, as long as the ring's count of changes stands still.
        self._known: dict[int, WindowStatistics] = {}
        self._known_at = -1

    def due(self) -> bool:
        """Whether it is time for the next refresh."""
        return self._clock() >= max(self._rested, min(self._due.values()))

    def record_canary(self, rows: Tensor) -> None:
        """Compare what the reference's canary images embed to now, (m, d), with what they should."""
        assert self._reference is not None
        assert self._reference.canary is not None
        units = unit(rows)
        cosines = (units.double() * self._reference.canary.double()).sum(1)
        self._canary = Canary(float(cosines.min()), Moments(self._dimension).add(units).participation_ratio())
        self._canary_time = self._clock()

    def refresh(self, ring: Ring, evidence: Evidence, counters: Counters, everything: bool) -> Snapshot:
        """Measure the one window that is most overdue, or all of them, and say what they show together."""
        started, now = time.monotonic(), self._clock()
        ring.expire(now)
        held = {seconds: ring.within(seconds, now) for seconds in self._windows}
        wanted = held | self._since(held[self._windows[-1]], evidence, now)
        turns = [seconds for seconds in sorted(wanted, key=self._due.__getitem__) if self._due[seconds] <= now]
        # At d = 2048 the eigenvalues alone take most of a second.
        for seconds in wanted if everything else turns[:1]:
            length = seconds or now - self._change
            self._measured[seconds] = replace(self._measure(wanted[seconds], ring.changes), seconds=length)
            self._due[seconds] = now + (seconds or self._windows[0]) / _TIMES_A_WINDOW
        described = {seconds: _inputs(blocks) for seconds, blocks in wanted.items()}
        inputs = {seconds: self._read(moments) for seconds, moments in described.items()}
        change = Change(evidence.signal, self._measured[_SINCE], inputs[_SINCE]) if _SINCE in wanted else None
        start = now - self._windows[0] if change is None else self._change
        shortest, windows = described[self._windows[0]], {seconds: self._measured[seconds] for seconds in held}
        snapshot = Snapshot(
            time.time(),
            self._dimension,
            windows,
            diagnose(windows, self._reference, self._canary, inputs, change, vouched=self._canary_time >= start),
            thresholds(self._reference, max(2, windows[self._windows[0]].rows)),
            counters,
            self._canary,
            math.nan if shortest is None else shortest.participation_ratio(),
            self._reference,
            inputs[self._windows[0]],
            evidence,
        )
        self._rested = self._clock() + (time.monotonic() - started) / _DUTY
        return snapshot

    def _since(self, blocks: Sequence[Block], evidence: Evidence, now: float) -> dict[float, list[Block]]:
        """The blocks that began after the change, under its own key; a new change is due at once."""
        if not evidence.alarm:
            self._due[_SINCE], self._change = math.inf, math.nan
            return {}
        if evidence.since != self._change:
            self._due[_SINCE], self._change = -math.inf, evidence.since
        return {_SINCE: [block for block in blocks if block.start > evidence.since]}

    def _measure(self, blocks: Sequence[Block], changes: int) -> WindowStatistics:
        """The statistics of the latest blocks: computed once for windows that hold the same."""
        if changes != self._known_at:
            self._known, self._known_at = {}, changes
        if len(blocks) not in self._known:
            self._known[len(blocks)] = measure(math.nan, blocks, self._reference, self._dimension)
        return self._known[len(blocks)]

    def _read(self, inputs: Moments | None) -> InputReading:
        known = self._reference is not None and self._reference.inputs is not None
        return self._reference.inputs.read(inputs) if known else InputReading()  # type: ignore[union-attr]


def _inputs(blocks: Sequence[Block]) -> Moments | None:
    described = [block.inputs for block in blocks if block.inputs is not None]
    return merge(described) if described else None
