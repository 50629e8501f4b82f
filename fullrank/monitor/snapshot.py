"""What a monitor shows: totals that only grow, and the latest statistics with their verdict."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fullrank.calibration.inputs import InputReading
from fullrank.calibration.sequential import Evidence
from fullrank.reference import Reference
from fullrank.statistics import Canary, WindowStatistics
from fullrank.verdict import Verdict

FATES = ("sampled", "duplicate", "dropped", "nonfinite")


@dataclass
class Counters:
    """Totals since the start, for `rate()`: they only grow."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    trace_product: float = 0.0
    frobenius_product: float = 0.0
    band_energy: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

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
    """The monitor's statistics at `timestamp` (Unix seconds)."""

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
