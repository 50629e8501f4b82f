"""Pushes the metrics of GET /metrics to an OpenTelemetry collector (OTLP over HTTP), read from the same registry."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from fullrank import __version__ as VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter

log = logging.getLogger("fullrank.service")
LAST = 5.0  # seconds that the last push may take when the service ends


class Pushing:
    """Sends all series of a registry, every OTEL_METRIC_EXPORT_INTERVAL milliseconds and when it is closed.

    Names, labels and values are those of /metrics, and nothing is counted twice: counters without `_total`, which is
    how OpenTelemetry names them and what Prometheus adds again; an info and each quantile of a summary as a gauge. The
    other OTEL_* variables say where to, and with which headers, as for spans.
    """

    def __init__(self, registry: CollectorRegistry, exporter: "MetricExporter | None" = None) -> None:
        """Raises RuntimeError if OpenTelemetry is not installed or a variable is no number."""
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.metrics import export
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as error:
            raise RuntimeError(
                f"otlp_metrics is on but {error.name} is not installed: pip install 'fullrank-server[tracing]', "
                "or set FULLRANK_OTLP_METRICS=false"
            ) from error
        interval = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "60000")
        try:
            self._interval = max(0.001, float(interval) / 1000)
        except ValueError as error:
            raise RuntimeError(f"OTEL_METRIC_EXPORT_INTERVAL: {interval!r} is no number of milliseconds") from error
        name = os.environ.get("OTEL_SERVICE_NAME", "fullrank")
        self._resource = Resource.create({"service.name": name, "service.version": VERSION})
        self._scope = InstrumentationScope("fullrank", VERSION)
        self._sdk = export
        self._registry = registry
        self._exporter = exporter or OTLPMetricExporter()
        self._started = time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)

    def start(self) -> None:
        """Begin to push, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """Push the last figures, if the collector takes them within seconds, and end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(LAST)
        self._exporter.shutdown()

    def _run(self) -> None:
        while True:
            last = self._stop.wait(self._interval)
            try:
                self._exporter.export(self.data(), timeout_millis=10_000)
            except Exception as error:  # whatever it is, the next push may succeed, and requests must not suffer
                log.warning("metrics could not be pushed: %s", error)
            if last:
                return

    def data(self) -> Any:
        """The registry's present state as an OpenTelemetry MetricsData."""
        now = time.time_ns()
        metrics = [self._metric(family, now) for family in self._registry.collect() if family.samples]
        scope = self._sdk.ScopeMetrics(self._scope, metrics, "")
        return self._sdk.MetricsData([self._sdk.ResourceMetrics(self._resource, [scope], "")])

    def _metric(self, family: Family, now: int) -> Any:
        sdk = self._sdk
        cumulative = sdk.AggregationTemporality.CUMULATIVE
        name = family.name
        data: Any
        if family.type == "counter":
            created = {_key(it): it.value for it in family.samples if it.name == f"{name}_created"}
            counts = [it for it in family.samples if it.name == f"{name}_total"]
            data = sdk.Sum([self._number(it, now, created.get(_key(it))) for it in counts], cumulative, True)
        elif family.type == "histogram":
            data = sdk.Histogram([self._histogram(name, it, now) for it in _by_labels(family.samples)], cumulative)
        else:
            name = f"{name}_info" if family.type == "info" else name
            data = sdk.Gauge([self._number(it, now) for it in family.samples if it.name == name])
        return sdk.Metric(name, family.documentation, "", data)

    def _number(self, sample: Sample, now: int, created: float | None = None) -> Any:
        start = self._started if created is None else round(created * 1e9)
        return self._sdk.NumberDataPoint(dict(sample.labels), start, now, float(sample.value))

    def _histogram(self, name: str, samples: Sequence[Sample], now: int) -> Any:
        values = {it.name.removeprefix(name): it.value for it in samples}
        buckets = sorted((float(it.labels["le"]), it.value) for it in samples if it.name == f"{name}_bucket")
        counts = [int(upto - before) for (_, upto), (_, before) in zip(buckets, [(0.0, 0.0), *buckets], strict=False)]
        labels = {key: value for key, value in samples[0].labels.items() if key != "le"}
        start = round(values["_created"] * 1e9) if "_created" in values else self._started
        return self._sdk.HistogramDataPoint(
            attributes=labels,
            start_time_unix_nano=start,
            time_unix_nano=now,
            count=sum(counts),
            sum=values["_sum"],
            bucket_counts=counts,
            explicit_bounds=[bound for bound, _ in buckets[:-1]],
            min=float("inf"),
            max=float("-inf"),
        )


def _key(sample: Sample) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in sample.labels.items() if key != "le"))


def _by_labels(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    groups: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(_key(sample), []).append(sample)
    yield from groups.values()
