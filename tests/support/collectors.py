"""What replicas report to a fleet's collector, and how its scrape is read."""

from collections.abc import Iterable, Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fullrank import Reference, SpectrumMonitor
from scale.collector import Collector
from scale.reports import Report, Watched
from service.watching.peers import Families

D = 16


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rows(count: int, seed: int, scale: Sequence[float] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.8**k for k in range(D)] if scale is None else scale)
    return torch.nn.functional.normalize(torch.randn(count, D, generator=generator) * spread + 0.5, dim=1)


REFERENCE = Reference.build(rows(4096, 1), rows(4096, 2))


def watched(given: torch.Tensor, *, revision: str = "r1", groups: int = 3, whole: bool = True) -> Watched:
    """What a replica reports whose real monitor was shown these rows."""
    with SpectrumMonitor(D, REFERENCE, windows=(300.0, 3600.0), block_rows=64) as monitor:
        monitor.observe(given)
        snapshot = monitor.snapshot(wait=60)
        return Watched(
            "alpha",
            revision,
            "alpha@r1",
            D,
            monitor.windows,
            monitor.blocks(groups),
            snapshot.verdict.state,
            snapshot.verdict.reason,
            monitor.counters.seen,
            True,
            None,
            REFERENCE if whole else None,
        )


def metrics(images: float, *, revision: str = "r1", pending: int = 0, seconds: Iterable[float] = ()) -> list[Metric]:
    """What a replica's registry holds."""
    registry = CollectorRegistry()
    Counter("images", "Images.", registry=registry).inc(images)
    Counter("encoder_images", "Images.", ["model", "revision"], registry=registry).labels("alpha", revision).inc(images)
    Gauge("pending", "Pending.", registry=registry).set(pending)
    histogram = Histogram("took", "Seconds.", buckets=(1.0, 2.0), registry=registry)
    for it in seconds:
        histogram.observe(it)
    return list(registry.collect())


def report(
    replica: str,
    images: float = 0,
    it: Watched | None = None,
    *,
    revision: str = "r1",
    last: bool = False,
    seconds: Iterable[float] = (),
) -> Report:
    held = metrics(images, revision=revision, seconds=seconds)
    return Report(replica, held, [("alpha", revision)], None if it is None else [it], last=last)


def value(collector: Collector, name: str, **labels: str) -> float | None:
    """A sample of the scrape, read as Prometheus reads it."""
    text = generate_latest(Families(collector.metrics())).decode()  # type: ignore[arg-type]
    found = [
        it.value
        for family in text_string_to_metric_families(text)
        for it in family.samples
        if it.name == name and it.labels == labels
    ]
    assert len(found) < 2, f"{name} is there twice"
    return found[0] if found else None
