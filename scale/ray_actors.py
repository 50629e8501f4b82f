"""The autoscaling policy, which Ray Serve's controller has to import, and the collector actor. It imports no torch."""

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

    from scale.reports import Order, Report, Wanted

PENDING = "pending_images"
LEAVE = 600.0  # seconds without a report after which a collector ends: replicas that come later begin at zero


class PendingImages:
    """Autoscaling policy: as many replicas as bring the pending images of each down to the target."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas. Ray applies delays and bounds to it."""
        pending = sum(context.aggregated_metrics.get(PENDING, {}).values())
        return max(1, math.ceil(pending / self._target)), {}


class CollectorActor:
    """The collector as a Ray actor. All methods run on its event loop; eigenvalues are computed beside it.

    It outlives each replica and each version of the application, so that counters go on over an update, and ends itself
    when no replica has reported for `leave` seconds.
    """

    def __init__(self, leave: float = LEAVE) -> None:
        from scale.collector import Collector

        self._collector = Collector()
        self._measuring = asyncio.Lock()
        self._leave = leave
        self._heard = time.monotonic()
        self._leaving: asyncio.Task[None] | None = None

    async def push(self, report: "Report") -> "Wanted":
        """See Collector.push."""
        self._heard = time.monotonic()
        self._leaving = self._leaving or asyncio.create_task(self._leave_when_silent())
        return self._collector.push(report)

    async def _leave_when_silent(self) -> None:
        import ray

        while (left := self._heard + self._leave - time.monotonic()) > 0:
            await asyncio.sleep(left)
        ray.kill(ray.get_runtime_context().current_actor)

    async def metrics(self) -> "tuple[list[str], list[Metric]]":
        """See Collector.awaited and Collector.metrics."""
        await self._measure()
        return self._collector.awaited(), self._collector.metrics()

    async def spectrum(self, model: str | None) -> dict[str, Any]:
        """See Collector.spectrum."""
        await self._measure()
        return self._collector.spectrum(model)

    async def order(self, name: str, gate: str, replaces: str | None, started_with: str) -> "Order":
        """See Collector.order."""
        return self._collector.order(name, gate, replaces, started_with)

    async def progress(self, number: int, started_with: str) -> tuple[list[str], dict[str, str]]:
        """See Collector.progress."""
        return self._collector.progress(number, started_with)

    async def _measure(self) -> None:
        async with self._measuring:
            if self._collector.due():
                await asyncio.to_thread(self._collector.measure)
