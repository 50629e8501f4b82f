"""docs/reference/metrics.md: every metric's name, type, labels, unit and meaning, from the collectors themselves."""

from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram, Metric

from fullrank.exposition import SpectrumCollector
from service.metrics import Metrics
from tools.reference.text import table

HEAD = """# Metrics

`GET /metrics` has these. `python -m tools.reference` writes this page from the code that exports them.
[What the numbers mean](../explanation/statistics.md) says what the statistics are and when to trust them.
[Alerts](alerts.md) has the alerts that rest on them.

A counter's name ends in `_total`. A histogram has `_bucket`, `_sum` and `_count`. A statistic that the rows do not
determine is `NaN`, so every series is there from the start.
"""
SERVING = """
## Serving

One set for each replica.

"""
SPECTRUM = """
## Spectrum and verdict

One set for each encoder, with the labels `model` and `revision`. Rows of `POST /observe` have the revision `observed`.
`window` is a duration such as `5m` or `1h`; `bound` is `estimate`, `lower` or `upper`.

"""
PROCESS = """
Beside these are the usual `process_*` and `python_info` of the Prometheus client.
"""


def unit(name: str) -> str:
    """A metric's unit, which Prometheus' naming rules put at the end of its name."""
    name = name.removesuffix("_total").removesuffix("_limit")
    for ending in ("seconds", "bytes", "images", "rows", "units", "degrees"):
        if name.endswith(ending):
            return ending
    counted = {
        "fullrank_requests": "requests",
        "fullrank_batches": "batches",
        "fullrank_failed_batches": "batches",
        "fullrank_batch_size": "images",
        "fullrank_connections": "connections",
        "fullrank_dead_threads": "threads",
        "fullrank_killed_decoders": "processes",
        "fullrank_persisted_windows": "windows",
        "fullrank_evidence": "log10 of a ratio",
    }
    if name in counted:
        return counted[name]
    if name.endswith(("_rank", "rankme", "participation_ratio")):
        return "dimensions"
    if name.endswith("_ratio"):
        return "ratio"
    if name.endswith(("_share", "_overlap")):
        return "share"
    if name.endswith(("unfit", "verdict", "_build")):
        return "0 or 1"
    return "none"


def serving() -> list[Metric]:
    """The service's own families. What has labels and no series yet gets one, so that its labels are known."""
    metrics = Metrics("version", "torch", "device")
    for it in vars(metrics).values():
        if isinstance(it, Counter | Gauge | Histogram) and it._labelnames and not it._metrics:
            it.labels(*it._labelnames)
    return [it for it in metrics.registry.collect() if it.name.startswith("fullrank_")]


def labels(metric: Metric) -> Iterable[str]:
    """The names of a metric's labels."""
    names: Iterable[str] = getattr(metric, "_labelnames", ())
    found = {name: None for sample in metric.samples for name in sample.labels}
    return names or [name for name in found if name not in ("le", "quantile")]


def exported(metric: Metric) -> str:
    """The name as it is scraped."""
    return {"counter": f"{metric.name}_total", "info": f"{metric.name}_info"}.get(metric.type, metric.name)


def rows(metrics: Iterable[Metric], without: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """One row for each metric: name, type, unit, labels, meaning."""
    for it in metrics:
        shown = " ".join(f"`{name}`" for name in labels(it) if name not in without)
        meaning = it.documentation.rstrip(".") + "."
        yield f"`{exported(it)}`", it.type, unit(it.name), shown, meaning


def page() -> str:
    header = ("metric", "type", "unit", "labels", "meaning")
    shared = ("model", "revision")
    return (
        HEAD
        + SERVING
        + table(header, rows(serving()))
        + PROCESS
        + SPECTRUM
        + table(header, rows(SpectrumCollector(lambda: []).describe(), shared))
    )
