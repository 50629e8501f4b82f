"""What a monitor shows: totals that only grow, and the latest statistics with their verdict."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fullrank.calibration.inputs import InputReading
from fullrank.calibration.sequential import Evidence
from fullrank.reference import Reference
from fullrank.statistics import Canary, WindowStatistics
from fullrank.verdict import Verdict

GROUPS = 10  # of consecutive blocks in each window, for the bounds
FATES = ("sampled", "duplicate", "dropped", "nonfinite")


@dataclass
class Counters:
    """Totals since the start, for `rate()`: they only grow."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    trace_product: float = 0.0
    frobenius_product: float = 0.0
    band_energy: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

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


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The monitor's statistics at `timestamp` (Unix seconds); `str` says them in a few words.

    waiting: rows that were observed and are not in these statistics yet.
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
    waiting: int = 0

    @property
    def waits_for(self) -> str:
        """In words, what has to come before these figures are complete; empty where they are."""
        seconds, window = min(self.windows.items())
        said = []
        if self.waiting:
            said.append(
                f"{self.waiting} rows observed are not counted yet: a block closes when it is full or after "
                f"{seconds / GROUPS:g} s; snapshot(wait=10) or flush() does not wait for that"
            )
        elif not window.rows:
            said.append(f"nothing was observed in the last {seconds:g} s")
        if window.rows and math.isnan(window.effective_rank):
            said.append(f"the effective rank needs more rows: {window.rows} do not determine it")
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
        words += [text for text in (self.waits_for, f"{self.verdict.state}: {self.verdict.reason}") if text]
        return "\n".join(words)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: NaN as None, eigenvalues as a list."""
        ref = self.reference
        windows = {}
        for seconds, w in self.windows.items():
            fields = {name: getattr(w, name) for name in w.__dataclass_fields__} | {
                "eigenvalues": w.eigenvalues.tolist()
            }
            fields |= {"bands": [asdict(b) for b in w.bands], "head": asdict(w.head)}
            windows[f"{seconds:g}"] = fields | {"participation_ratio": asdict(w.participation_ratio)}
        value = {
            "timestamp": self.timestamp,
            "dimension": self.dimension,
            "verdict": asdict(self.verdict),
            "windows": windows,
            "thresholds": self.thresholds,
            "counters": asdict(self.counters),
            "waits_for": self.waits_for,
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


def to_json(value: Any) -> Any:
    """NaN and infinity as None, all the way down: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value
