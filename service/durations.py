"""A histogram of seconds that one thread fills, for what every request observes.

prometheus_client's own takes two locks and tries its bounds one by one: five of them were a seventh of the event loop's
time for a request. It may be read on any thread.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector


class Series:
    """What was observed for one value of the label."""

    __slots__ = ("_bounds", "_counts", "created", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self.total = 0.0
        self.created = time.time()

    def observe(self, seconds: float) -> None:
        """Count an observation."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> dict[float, float]:
        """Upper bound -> observations at most that long. The last bound is infinite, and its value the count."""
        at_most = 0.0
        return {bound: (at_most := at_most + count) for bound, count in zip(self._bounds, self._counts, strict=True)}


class Durations(Collector):
    """The histogram, with a series for each value of one label.

    bounds: of the buckets, in rising order; an infinite one is added.
    """

    def __init__(self, name: str, text: str, label: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._bounds = bounds
        self._series: dict[str, Series] = {}
        registry.register(self)

    def labels(self, value: str) -> Series:
        """The series of one value; it exists from the first call on."""
        if value not in self._series:
            self._series[value] = Series(self._bounds)
        return self._series[value]

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The family without its series, for the registry."""
        return [HistogramMetricFamily(self._name, self._text, labels=[self._label])]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The family, for a scrape."""
        (family,) = self.describe()
        for value, series in self._series.copy().items():
            buckets = [("+Inf" if math.isinf(it) else repr(it), count) for it, count in series.buckets().items()]
            family.add_metric([value], buckets, series.total)
            family.add_sample(f"{self._name}_created", {self._label: value}, series.created)
        return [family]
