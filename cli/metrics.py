"""fullrank metrics."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import AsJson, console, fail, printed

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

ENDINGS = {"counter": "_total", "info": "_info"}
# By how a name ends, or begins; the first that fits.
UNITS = {
    "_timestamp_seconds": "seconds since 1970",
    "_time_seconds": "seconds since 1970",
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_bytes_limit": "bytes",
    "_images": "images",
    "_images_limit": "images",
    "_rows": "rows",
    "_per_second": "images a second",
    "_batches": "batches",
    "_batch_size": "images",
    "_requests": "requests",
    "_connections": "connections",
    "_connections_limit": "connections",
    "_threads": "threads",
    "_fds": "file descriptors",
    "_windows": "windows",
    "_decoders": "processes",
    "_degrees": "degrees",
    "_rank": "directions",
    "rankme": "directions",
    "participation_ratio": "directions",
    "_ratio": "ratio",
    "_share": "ratio",
    "_accuracy_ratio": "ratio",
    "_cosine": "cosine",
    "_cosine_min": "cosine",
    "_variance": "squared length",
    "_energy": "squared length",
    "_eigenvalue": "squared length",
    "_epoch": "epochs",
    "_epochs": "epochs",
    "_verdict": "0 or 1",
    "_unfit": "0 or 1",
    "_info": "always 1",
}
NO_UNIT = "none"


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
    found = [it for it in described() if name in it.name]
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
    for family in SpectrumCollector(lambda: ()).describe():
        found.append(_described(family, "service, monitor", list(getattr(family, "_labelnames", ()))))
    for where, registry in (("service", Metrics("", "", "").registry), ("training", registered("", 0)[0])):
        found += [_described(family, where, labels) for family, labels in _families(registry)]
    return sorted(found, key=lambda it: (not it.name.startswith("fullrank_"), it.name))


def _families(registry: "CollectorRegistry") -> "Iterator[tuple[Metric, list[str]]]":
    """The families of a registry, and the labels of each."""
    for collector in list(registry._collector_to_names):
        declared: Any = getattr(collector, "_labelnames", ())
        for family in collector.collect():
            seen = {key for sample in family.samples for key in sample.labels} - {"le"}
            yield family, list(declared) or sorted(seen)


def _described(family: "Metric", where: str, labels: list[str]) -> Described:
    name = family.name + ENDINGS.get(family.type, "")
    unit = next((unit for end, unit in UNITS.items() if family.name.endswith(end)), NO_UNIT)
    return Described(
        name, where, family.type, "always 1" if family.type == "info" else unit, labels, family.documentation
    )
