"""fullrank metrics."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import AsJson, console, fail, printed

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

ENDINGS = {"counter": "_total", "info": "_info"}
SERVICE, MONITOR, TRAINING = "service", "service, monitor", "training"
# Units by how a name ends, the first that fits; `_total` and `_limit` are taken off before.
UNITS = {
    "_timestamp_seconds": "seconds since 1970",
    "process_start_time_seconds": "seconds since 1970",
    "seconds": "seconds",
    "bytes": "bytes",
    "views_per_second": "images a second",
    "images": "images",
    "batch_size": "images",
    "rows": "rows",
    "units": "units",
    "degrees": "degrees",
    "requests": "requests",
    "batches": "batches",
    "connections": "connections",
    "threads": "threads",
    "killed_decoders": "processes",
    "persisted_windows": "windows",
    "fds": "file descriptors",
    "_epoch": "epochs",
    "_epochs": "epochs",
    "fullrank_evidence": "log10 of a ratio",
    "_rank": "dimensions",
    "rankme": "dimensions",
    "participation_ratio": "dimensions",
    "_ratio": "ratio",
    "_share": "share",
    "_overlap": "share",
    "unfit": "0 or 1",
    "verdict": "0 or 1",
    "_build": "0 or 1",
}


@dataclass(frozen=True)
class Described:
    """One metric: its name in queries, where it is exported, type, unit, labels and meaning."""

    name: str
    exported_by: str
    type: str
    unit: str
    labels: list[str]
    meaning: str


def metrics(
    name: Annotated[str, typer.Argument(help="Show only metrics whose name holds this.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show every Prometheus metric: name, type, unit, labels and meaning.

    Example: fullrank metrics canary
    """
    found = sorted((it for it in described() if name in it.name), key=lambda it: it.name)
    if not found:
        fail(f"no metric's name holds {name!r}; without a name all are shown")
    if as_json:
        printed([asdict(it) for it in found], "", as_json)
        return
    for it in found:
        console.print(f"{it.name}  ", style="bold", end="")
        console.print(f"{it.type}, {it.unit}, by {it.exported_by}" + f" {{{', '.join(it.labels)}}}" * bool(it.labels))
        console.print(f"    {it.meaning}", soft_wrap=False)


def described() -> list[Described]:
    """Every metric of the service, of its monitors and of training, from the code that exports it."""
    from fullrank.exposition import SpectrumCollector
    from service.metrics import Metrics
    from training.watch import registered

    found = []
    for who, registry in ((SERVICE, Metrics("", "", "").registry), (TRAINING, registered("", 0)[0])):
        found += [_described(family, who, labels) for family, labels in _families(registry)]
    for family in SpectrumCollector(lambda: ()).describe():
        found.append(_described(family, MONITOR, list(getattr(family, "_labelnames", ()))))
    return found


def unit(name: str) -> str:
    """A metric's unit, which Prometheus' naming rules put at the end of its name."""
    name = name.removesuffix("_total").removesuffix("_limit")
    return next((unit for end, unit in UNITS.items() if name.endswith(end)), "none")


def _families(registry: "CollectorRegistry") -> "Iterator[tuple[Metric, list[str]]]":
    """The families of a registry, and the labels of each."""
    for collector in list(registry._collector_to_names):
        declared: Any = getattr(collector, "_labelnames", ())
        for family in collector.collect():
            seen = {key for sample in family.samples for key in sample.labels} - {"le"}
            yield family, list(declared) or sorted(seen)


def _described(family: "Metric", who: str, labels: list[str]) -> Described:
    name = family.name + ENDINGS.get(family.type, "")
    return Described(name, who, family.type, unit(family.name), labels, family.documentation)
