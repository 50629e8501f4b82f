"""Reports of replicas: what one replica tells the collector of its fleet, and what it is told in return."""

from collections.abc import Collection
from dataclasses import dataclass, field

from prometheus_client import Metric

from fullrank import Reference, SpectrumMonitor
from fullrank.canary import Canary
from fullrank.monitor.window import Block
from service.encoders.registry import Service

Encoder = tuple[str, str]  # model and revision
SILENT = 15.0  # seconds without a report after which a replica counts as gone


@dataclass(frozen=True)
class Watched:
    """One monitor of a replica: its own verdict, and its windows as a few blocks of moments.

    compared_with: model@revision of the reference. blocks: their times are ages in seconds. referenced: whether there
    is a reference; it is sent only if the collector asked for it, because it is large.
    """

    model: str
    revision: str
    compared_with: str
    dimension: int
    windows: tuple[float, ...]
    blocks: list[Block]
    verdict: str
    reason: str
    seen: int
    referenced: bool = False
    canary: Canary | None = None
    reference: Reference | None = None

    @property
    def encoder(self) -> Encoder:
        """What its rows came from."""
        return self.model, self.revision

    @property
    def kind(self) -> tuple[str, int, tuple[float, ...]]:
        """Moments of one encoder merge only where these agree."""
        return self.compared_with, self.dimension, self.windows

    @property
    def kind_in_words(self) -> str:
        """The same for people."""
        windows = ", ".join(f"{seconds:g}" for seconds in self.windows)
        compared = f"compared with {self.compared_with or 'nothing'}"
        return f"{self.dimension} dimensions, windows of {windows} s, {compared}"


@dataclass(frozen=True)
class Order:
    """A swap that every replica has to make. `number` counts orders from 1."""

    number: int
    name: str
    gate: str
    replaces: str | None


@dataclass(frozen=True)
class Report:
    """What a replica sends. `watched` is None where only the metrics are new.

    orders: all that it knows, so that a collector which was restarted knows them again. done: number of the last order
    that it carried out or failed at; failed: number -> reason. silent: seconds without another report after which the
    replica counts as gone. started_with: names the settings that it started with.
    """

    replica: str
    metrics: list[Metric]
    serving: list[Encoder]
    watched: list[Watched] | None = None
    orders: tuple[Order, ...] = ()
    done: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    last: bool = False
    silent: float = SILENT
    started_with: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the collector tells a replica: all orders, in how many blocks it wants a window, and missing references."""

    orders: tuple[Order, ...] = ()
    groups: int = 3
    references: frozenset[Encoder] = frozenset()


def not_heard_of(replicas: Collection[str]) -> str:
    """What a collector that was started again says until the replicas of the one before have reported to it."""
    return f"the collector of the fleet was started again and has not heard of {', '.join(replicas)} yet"


def watched_by(service: Service, groups: int, references: Collection[Encoder]) -> list[Watched]:
    """Every monitor of a service. Blocks while moments are copied, so it is for a worker thread."""
    baselines = {(it.name, it.revision): it.baseline.card for it in service.in_service()}
    found = []
    for model, revision, monitor in service.monitors():
        encoder = model, revision
        card = baselines.get(encoder)
        named = "" if card is None else f"{card.name}@{card.revision}"
        found.append(_watched(encoder, monitor, named, groups, encoder in references))
    return found


def _watched(encoder: Encoder, monitor: SpectrumMonitor, compared_with: str, groups: int, whole: bool) -> Watched:
    snapshot = monitor.snapshot()
    return Watched(
        *encoder,
        compared_with,
        monitor.dimension,
        monitor.windows,
        monitor.blocks(groups),
        snapshot.verdict.state,
        snapshot.reason,
        monitor.counters.seen,
        monitor.reference is not None,
        snapshot.canary,
        monitor.reference if whole else None,
    )


def metrics_of(service: Service) -> list[Metric]:
    """Every metric family of a service, with its samples as they are now."""
    return list(service.metrics.registry.collect())


def serving(service: Service) -> list[Encoder]:
    """Every encoder of a service that metrics may name: those in service and those that others' rows come from."""
    served = [(it.name, it.revision) for it in service.in_service()]
    return list(dict.fromkeys([*served, *((model, revision) for model, revision, _ in service.monitors())]))
