"""Snapshots: what a monitor shows, and how it is made from blocks, one window's eigenvalues at a time."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from fullrank.calibration.inputs import InputReading
from fullrank.calibration.sequential import Evidence
from fullrank.canary import Canary, CanaryReader
from fullrank.dependence import LEAST_INPUTS
from fullrank.measures import wasserstein_uniformity
from fullrank.moments import Moments
from fullrank.monitor.window import Block, Ring, inputs_of
from fullrank.reference import Reference
from fullrank.sample import SampleMeasures, alike, measure_sample, together
from fullrank.statistics import WindowStatistics, measure
from fullrank.verdict import Change, Verdict, canary_fault, diagnose, judge_window, thresholds

GROUPS = 10  # of consecutive blocks in each window, for the bounds
FATES = ("sampled", "duplicate", "dropped", "nonfinite", "zero")
# A refresh that takes long is made more rarely: at most this share of one core goes into refreshing.
_DUTY = 0.05
# Each window is measured this many times in its own length.
_TIMES_A_WINDOW = 30
# Stands among the windows' seconds for the rows since the change that the sequential test found.
_SINCE = 0.0


@dataclass
class Counters:
    """Totals since the start, for `rate()`: they only grow. unsampled: rows that the caller left out of its sample."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    trace_product: float = 0.0
    frobenius_product: float = 0.0
    band_energy: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    unsampled: int = 0

    @property
    def seen(self) -> int:
        """Rows that reached the monitor's thread, whatever became of them there."""
        return sum(self.rows.values()) - self.rows["dropped"]

    def add(self, more: "Counters") -> None:
        """Add what another counted."""
        for fate, rows in more.rows.items():
            self.rows[fate] += rows
        for rank, energy in more.band_energy.items():
            self.band_energy[rank] += energy
        self.trace_product += more.trace_product
        self.frobenius_product += more.frobenius_product
        self.seconds += more.seconds
        self.unsampled += more.unsampled


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The monitor's statistics at `timestamp` (Unix seconds); `str` says them in a few words.

    verdict: on what passes now; window_verdicts: on each window alone; waiting: rows that were observed and are not in
    these statistics yet.
    """

    timestamp: float
    dimension: int
    windows: dict[float, WindowStatistics]
    verdict: Verdict
    thresholds: dict[str, float]
    counters: Counters
    canary: Canary | None
    input_participation_ratio: float
    reference: Reference | None
    inputs: InputReading
    evidence: Evidence
    window_verdicts: dict[float, Verdict] = field(default_factory=dict)
    waiting: int = 0

    @property
    def uncounted(self) -> str:
        """In words, how many rows were observed and are not in these figures yet; empty where all are."""
        if not self.waiting:
            return ""
        rows = "1 row observed is" if self.waiting == 1 else f"{self.waiting} rows observed are"
        return f"{rows} not counted yet: a block closes when it is full or after {min(self.windows) / GROUPS:g} s"

    @property
    def reason(self) -> str:
        """The verdict's reason. Who sent the first images and reads "0 rows" would take it that they went astray: where
        rows are too few, it says how many are not counted yet."""
        waits = self.verdict.state == "insufficient_data" and self.waiting
        return f"{self.verdict.reason}; {self.uncounted}" if waits else self.verdict.reason

    @property
    def waits_for(self) -> str:
        """In words, what has to come before these figures are complete; empty where they are."""
        seconds, window = min(self.windows.items())
        said = []
        if self.waiting:
            said.append(self.uncounted)
        elif not window.rows:
            said.append(f"nothing was observed in the last {seconds:g} s")
        if window.rows and math.isnan(window.effective_rank):
            said.append(
                f"the effective rank needs more rows: {window.rows} do not determine it "
                f"({window.unknown.get('effective_rank', '')})"
            )
        return "; ".join(said)

    def __str__(self) -> str:
        seconds, window = min(self.windows.items())
        ratio = window.participation_ratio
        figures = {
            f"effective rank {window.effective_rank:.1f} of {self.dimension}": window.effective_rank,
            f"participation ratio {ratio.estimate:.1f}": ratio.estimate,
            f"total variance {window.total_variance:.3g}": window.total_variance,
        }
        known = [text for text, value in figures.items() if math.isfinite(value)]
        words = [f"{', '.join(known) or 'no figures'} over {window.rows} rows of the last {seconds:g} s"]
        at_once = "snapshot(wait=10) and flush() count them at once" if self.waiting else ""
        words += [it for it in (self.waits_for, at_once, f"{self.verdict.state}: {self.verdict.reason}") if it]
        return "\n".join(words)

    def measures(self) -> dict[str, Any]:
        """What the shortest window says beside its spectrum: Wasserstein uniformity, and the measures of its sample."""
        window = self.windows[min(self.windows)]
        return {"wasserstein_uniformity": window.wasserstein_uniformity} | window.sample.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: NaN as None, eigenvalues as a list."""
        ref = self.reference
        windows = {}
        for seconds, w in self.windows.items():
            fields = {name: getattr(w, name) for name in w.__dataclass_fields__} | {
                "eigenvalues": w.eigenvalues.tolist()
            }
            fields |= {"sample": w.sample.to_dict()}
            fields |= {"bands": [asdict(b) for b in w.bands], "head": asdict(w.head)}
            windows[f"{seconds:g}"] = fields | {"participation_ratio": asdict(w.participation_ratio)}
        value = {
            "timestamp": self.timestamp,
            "dimension": self.dimension,
            "verdict": {"state": self.verdict.state, "reason": self.reason},
            "window_verdicts": {f"{seconds:g}": asdict(it) for seconds, it in self.window_verdicts.items()},
            "windows": windows,
            "thresholds": self.thresholds,
            "counters": asdict(self.counters),
            "waits_for": self.waits_for,
            "measures": self.measures(),
            "canary": self.canary and asdict(self.canary),
            "input_participation_ratio": self.input_participation_ratio,
            "inputs": asdict(self.inputs),
            "evidence": asdict(self.evidence),
            "reference": ref
            and {
                "participation_ratio": ref.participation_ratio,
                "effective_rank": ref.effective_rank,
                "total_variance": ref.total_variance,
                "numerical_rank": ref.numerical_rank,
                "rows": ref.rows,
                "dtype": ref.dtype,
                "eigenvalues": ref.eigenvalues.tolist(),
                "band_energy": dict(zip(ref.bands, ref.band_energy.tolist(), strict=True)),
            },
        }
        json: dict[str, Any] = to_json(value)
        return json


class SnapshotMaker:
    """Makes the snapshots of one monitor. `windows` are seconds, rising. For one thread at a time."""

    def __init__(
        self, dimension: int, reference: Reference | None, windows: Sequence[float], clock: Callable[[], float]
    ) -> None:
        self._dimension = dimension
        self._reference = reference
        self._windows = tuple(windows)
        self._clock = clock
        stored = None if reference is None else reference.canary
        self._reader = None if stored is None else CanaryReader(stored)
        self._canary: Canary | None = None
        self._canary_time = -math.inf
        self._measured: dict[float, WindowStatistics] = {}
        self._due = dict.fromkeys(self._windows, -math.inf) | {_SINCE: math.inf}
        self._rested = -math.inf
        self._change = math.nan
        # Number of latest blocks -> their statistics, for as long as the ring does not change.
        self._known: dict[int, WindowStatistics] = {}
        self._known_at = -1

    def due(self) -> bool:
        """Whether it is time for the next refresh."""
        return self._clock() >= max(self._rested, min(self._due.values()))

    def record_canary(self, rows: Tensor) -> None:
        """Compare what the reference's canary images embed to now, (m, d), with what they should."""
        assert self._reader is not None
        self._canary = self._reader.read(rows)
        self._canary_time = self._clock()

    def refresh(self, ring: Ring, evidence: Evidence, counters: Counters, everything: bool) -> Snapshot:
        """Measure the most overdue window, or all of them, and judge the traffic by all that is known."""
        started = time.monotonic()
        now = self._clock()
        ring.expire(now)
        held = {seconds: ring.within(seconds, now) for seconds in self._windows}
        wanted = held | self._since(held[self._windows[-1]], evidence, now)
        turns = [seconds for seconds in sorted(wanted, key=self._due.__getitem__) if self._due[seconds] <= now]
        # At d = 2048 the eigenvalues alone take most of a second.
        for seconds in wanted if everything else turns[:1]:
            length = seconds or now - self._change
            self._measured[seconds] = replace(self._measure(wanted[seconds], ring.changes), seconds=length)
            self._due[seconds] = now + (seconds or self._windows[0]) / _TIMES_A_WINDOW
        described = {seconds: inputs_of(blocks) for seconds, blocks in wanted.items()}
        inputs = {seconds: self._read(moments) for seconds, moments in described.items()}
        change = Change(evidence.signal, self._measured[_SINCE], inputs[_SINCE]) if _SINCE in wanted else None
        shortest = self._windows[0]
        windows = {seconds: self._measured[seconds] for seconds in held}
        described_now = described[shortest]
        snapshot = Snapshot(
            time.time(),
            self._dimension,
            windows,
            diagnose(
                windows,
                self._reference,
                self._canary,
                inputs,
                change,
                canary_is_recent=self._canary_since(now - shortest if change is None else self._change),
            ),
            thresholds(self._reference, max(2, windows[shortest].rows)),
            counters,
            self._canary,
            math.nan if described_now is None else described_now.participation_ratio(),
            self._reference,
            inputs[shortest],
            evidence,
            {
                seconds: judge_window(
                    window,
                    self._reference,
                    inputs[seconds],
                    canary_is_recent=self._canary_since(now - seconds),
                )
                for seconds, window in windows.items()
            },
        )
        self._rested = self._clock() + (time.monotonic() - started) / _DUTY
        return snapshot

    def _canary_since(self, start: float) -> bool:
        """Whether the canary was embedded after that time and is intact: it vouches for the model of the rows since."""
        recent = self._canary is not None and self._canary_time >= start
        return recent and canary_fault(self._reference, self._canary) is None

    def _since(self, blocks: Sequence[Block], evidence: Evidence, now: float) -> dict[float, list[Block]]:
        """The blocks that began after the change, under its own key; a new change is due at once."""
        if not evidence.alarm:
            self._due[_SINCE] = math.inf
            self._change = math.nan
            return {}
        if evidence.since != self._change:
            self._due[_SINCE] = -math.inf
            self._change = evidence.since
        # The block in which it began holds rows from before it. All blocks of one batch have the same time.
        began = [block for block in blocks if block.start == evidence.since]
        return {_SINCE: [*began[1:], *(block for block in blocks if block.start > evidence.since)]}

    def _measure(self, blocks: Sequence[Block], changes: int) -> WindowStatistics:
        """The statistics of the latest blocks: computed once for windows that hold the same."""
        if changes != self._known_at:
            self._known = {}
            self._known_at = changes
        if len(blocks) not in self._known:
            window = measure(math.nan, blocks, self._reference, self._dimension)
            sample = self._sampled(blocks)
            unknown = window.unknown | _no_correlation(sample, self._reference)
            self._known[len(blocks)] = replace(
                window, sample=sample, wasserstein_uniformity=_uniformity(window), unknown=unknown
            )
        return self._known[len(blocks)]

    def _sampled(self, blocks: Sequence[Block]) -> SampleMeasures:
        """The measures of a sample of the blocks' rows, with their inputs where these are the reference's kind."""
        parts = [(block.sample, block.sample_inputs) for block in blocks if block.sample is not None]
        counts = [block.moments.count for block in blocks if block.sample is not None]
        rows = together([rows for rows, _ in parts], counts)
        known = None if self._reference is None else self._reference.inputs
        if known is None:
            return measure_sample(rows)
        shown = alike([it for _, it in parts], [len(rows) for rows, _ in parts])
        if shown is None or not known.fits(shown[0].shape[1]):
            return measure_sample(rows)
        return measure_sample(rows, together([it[:, : known.width] for it in shown], counts), known.reach)

    def _read(self, inputs: Moments | None) -> InputReading:
        known = self._reference is not None and self._reference.inputs is not None
        return self._reference.inputs.read(inputs) if known else InputReading()  # type: ignore[union-attr]


def _no_correlation(sample: SampleMeasures, reference: Reference | None) -> dict[str, str]:
    """In words, why nothing is known of answers and inputs, or why no rule rests on it; empty where one does."""
    if math.isnan(sample.input_correlation.estimate):
        reason = f"fewer than {LEAST_INPUTS} different inputs, of the reference's kind, are known of the sampled rows"
    elif math.isnan(thresholds(reference)["input_correlation"]):
        reason = "what healthy traffic gives is not known, or too near 0 to tell; calibrate the reference again"
    else:
        return {}
    return {"input_correlation": reason}


def _uniformity(window: WindowStatistics) -> float:
    if window.rows < 2:
        return math.nan
    # What mean_cosine holds is |mean|^2 without what sampling adds.
    return wasserstein_uniformity(window.eigenvalues, max(0.0, window.mean_cosine), window.rows - 1)


def to_json(value: Any) -> Any:
    """NaN and infinity as None, all the way down: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value
