"""The replica's throughput, latency and queue, read from its metrics: nothing is counted a second time."""

import math
from collections.abc import Mapping, Sequence

from prometheus_client import Counter, Gauge

from service.metrics import EMBEDDING_ROUTES, PHASES, Metrics

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
Buckets = dict[float, float]  # upper bound -> requests at most that slow


def value_of(series: Counter | Gauge) -> float:
    """The value of one series."""
    return float(next(iter(series.collect())).samples[0].value)


def quantile(share: float, buckets: Mapping[float, float]) -> float:
    """Interpolate a quantile between the bounds of cumulative buckets, as PromQL's histogram_quantile; NaN of none."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return math.nan
    lower = below = 0.0
    for bound in bounds:
        if buckets[bound] >= share * total:
            if math.isinf(bound):
                return lower
            inside = buckets[bound] - below
            return lower + (bound - lower) * ((share * total - below) / inside if inside > 0 else 1.0)
        lower, below = bound, buckets[bound]
    return lower


class Meter:
    """Reads rates and latencies of the time between two calls of `read`. The first call has none to compare with."""

    def __init__(self, metrics: Metrics, routes: Sequence[str] = EMBEDDING_ROUTES) -> None:
        self._metrics = metrics
        self._routes = routes
        self._before: tuple[float, dict[str, float], Buckets] | None = None

    def read(self, now: float) -> dict[str, float]:
        """Images and refusals a second, quantiles of the time of a request, the mean time of each phase (seconds),
        and the images pending. NaN where nothing was answered."""
        totals, buckets = self._totals()
        before, self._before = self._before, (now, totals, buckets)
        figures = {"pending": value_of(self._metrics.pending)}
        if before is None or now <= before[0]:
            return figures
        more = {name: total - before[1][name] for name, total in totals.items()}
        spent = now - before[0]
        answered = {bound: count - before[2][bound] for bound, count in buckets.items()}
        figures |= {f"{name}_per_second": more[name] / spent for name in ("images", "refused")}
        figures |= {name: quantile(share, answered) for name, share in QUANTILES.items()}
        for phase in PHASES:
            count = more[f"{phase} count"]
            figures[phase] = more[phase] / count if count else math.nan
        return figures

    def _totals(self) -> tuple[dict[str, float], Buckets]:
        metrics = self._metrics
        refused = sum(value_of(series) for series in metrics.rejected.values())
        totals = {"images": value_of(metrics.images), "refused": refused}
        for phase, series in metrics.phase.items():
            totals[phase] = series.total
            totals[f"{phase} count"] = series.buckets()[math.inf]
        together: Buckets = {}
        for route in self._routes:
            for bound, count in metrics.request_seconds.labels(route).buckets().items():
                together[bound] = together.get(bound, 0.0) + count
        return totals, together
