"""What Ray Serve's controller has to import: the autoscaling policy and the collector actor. It imports no torch."""

import asyncio
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

    from scale.reports import Order, Report, Wanted

PENDING = "pending_images"


class PendingImages:
    """Autoscaling policy: as many replicas as bring the pending images of each down to the target."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas. Ray applies delays and bounds to it."""
        pending = sum(context.aggregated_metrics.get(PENDING, {}).values())
        return max(1, math.ceil(pending / self._target)), {}


class CollectorActor:
    """The collector as a Ray actor. All methods run on its event loop; eigenvalues are computed beside it."""

    def __init__(self, silent: float) -> None:
        from scale.collector import Collector

        self._collector = Collector(silent)
        self._measuring = asyncio.Lock()

    async def push(self, report: "Report") -> "Wanted":
        """See Collector.push."""
        return self._collector.push(report)

    async def metrics(self) -> "list[Metric]":
        """See Collector.metrics."""
        await self._measure()
        return self._collector.metrics()

    async def spectrum(self, model: str | None) -> dict[str, Any]:
        """See Collector.spectrum."""
        await self._measure()
        return self._collector.spectrum(model)

    async def order(self, name: str, gate: str, replaces: str | None) -> "Order":
        """See Collector.order."""
        return self._collector.order(name, gate, replaces)

    async def progress(self, number: int) -> tuple[list[str], dict[str, str]]:
        """See Collector.progress."""
        return self._collector.progress(number)

    async def _measure(self) -> None:
        async with self._measuring:
            if self._collector.due():
                await asyncio.to_thread(self._collector.measure)
