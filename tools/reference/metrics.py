"""docs/reference/metrics.md: every metric's name, type, labels, unit and meaning, from the collectors themselves."""

from collections.abc import Iterable, Iterator

from cli.metrics import MONITOR, SERVICE, TRAINING, Described, described
from fullrank.monitor.snapshot import FATES
from fullrank.rules import STATES
from fullrank.thresholds import SIGNALS
from service.metrics import CANARY, PHASES, REJECTIONS, WINDOWS
from tools.reference.text import table

HEAD = """# Metrics

`GET /metrics` has these, and `fullrank metrics` lists them. `python -m tools.reference` writes this page from the code.
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
`window` is a duration such as `5m` or `1h`; `rank` is the last direction of a band, or an eigenvalue's place.

"""
RUN = """
## Training

Exported by `fullrank train --metrics-port PORT`, with the label `run`.

"""
LABELS = """
## Values of labels

"""
PROCESS = """
Beside these are the usual `process_*` and `python_info` of the Prometheus client.
"""


def values() -> str:
    """What labels say whose name does not tell."""
    known = {
        "`phase`": PHASES,
        "`reason` of `fullrank_rejected_images_total`": REJECTIONS,
        "`result` of `fullrank_canary_images_total`": CANARY,
        "`result` of `fullrank_persisted_windows_total`": WINDOWS,
        "`fate` of `fullrank_rows_total`": FATES,
        "`bound`": ("lower", "estimate", "upper"),
        "`part`": ("head", "tail"),
        "`state`": STATES,
        "`signal`": SIGNALS,
    }
    return table(("label", "values"), ((name, " ".join(f"`{it}`" for it in them)) for name, them in known.items()))


def serving() -> list[Described]:
    """The service's own metrics."""
    return [it for it in described() if it.exported_by == SERVICE and it.name.startswith("fullrank_")]


def rows(metrics: Iterable[Described], without: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """One row for each metric: name, type, unit, labels, meaning."""
    for it in metrics:
        shown = " ".join(f"`{name}`" for name in it.labels if name not in without)
        yield f"`{it.name}`", it.type, it.unit, shown, it.meaning.rstrip(".") + "."


def page() -> str:
    header = ("metric", "type", "unit", "labels", "meaning")
    monitor, training = ([it for it in described() if it.exported_by == who] for who in (MONITOR, TRAINING))
    return (
        HEAD
        + SERVING
        + table(header, rows(serving()))
        + PROCESS
        + SPECTRUM
        + table(header, rows(monitor, ("model", "revision")))
        + RUN
        + table(header, rows(training, ("run",)))
        + LABELS
        + values()
    )
