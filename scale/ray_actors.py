"""The autoscaling policy, which Ray Serve's controller has to import, and the collector actor. It imports no torch."""

import asyncio
import json
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

    from scale.reports import Order, Report, Wanted

NAMESPACE = "fullrank"
PENDING = "pending_images"
KNOWN, SHOWN = "ledger", "shown"  # what a collector keeps
LEAVE = 600.0  # seconds without a report after which a collector ends: replicas that come later begin at zero


class PendingImages:
    """Autoscaling policy: as many replicas as bring the pending images of each down to the target."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The wanted number of replicas. Ray applies delays and bounds to it."""
        pending = sum(context.aggregated_metrics.get(PENDING, {}).values())
        return max(1, math.ceil(pending / self._target)), {}


class Kept:
    """What outlives an actor: values in the key-value store of Ray's head, under the actor's name.

    The store is not public. Ray Serve keeps its own state there, because nothing public outlives every node but one.
    """

    def __init__(self) -> None:
        import ray
        from ray.experimental import internal_kv

        self._store = internal_kv
        self._prefix = f"{ray.get_runtime_context().get_actor_name()}::"

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        value: bytes | None = self._store._internal_kv_get(self._prefix + key, namespace=NAMESPACE)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep a value in place of the one before."""
        self._store._internal_kv_put(self._prefix + key, value, namespace=NAMESPACE)

    def clear(self) -> None:
        """Forget all of this actor's values."""
        self._store._internal_kv_del(self._prefix, del_by_prefix=True, namespace=NAMESPACE)


class CollectorActor:
    """The collector as a Ray actor. All methods run on its event loop; eigenvalues are computed beside it.

    It outlives each replica and each version of the application, so that counters go on over an update, and ends itself
    when no replica has reported for `leave` seconds. If it is killed, the next one goes on with what it kept.
    """

    def __init__(self, leave: float = LEAVE, kept: Kept | None = None) -> None:
        from scale.collector import Collector
        from scale.totals import Ledger, from_json

        self._kept = kept or Kept()
        ledger, shown = self._kept.get(KNOWN), self._kept.get(SHOWN)
        self._collector = Collector(
            ledger=Ledger.load(ledger) if ledger else None, shown=from_json(json.loads(shown)) if shown else None
        )
        self._saved = self._collector.version
        self._measuring = asyncio.Lock()
        self._leave = leave
        self._heard = time.monotonic()
        self._leaving: asyncio.Task[None] | None = None

    async def push(self, report: "Report") -> "Wanted":
        """See Collector.push."""
        self._heard = time.monotonic()
        self._leaving = self._leaving or asyncio.create_task(self._leave_when_silent())
        wanted = self._collector.push(report)
        self._save()
        return wanted

    def _save(self) -> None:
        if self._saved != self._collector.version:
            self._saved = self._collector.version
            self._kept.put(KNOWN, self._collector.ledger().dump())

    async def _leave_when_silent(self) -> None:
        import ray

        while (left := self._heard + self._leave - time.monotonic()) > 0:
            await asyncio.sleep(left)
        self._kept.clear()
        ray.kill(ray.get_runtime_context().current_actor)

    async def metrics(self) -> "tuple[list[str], list[Metric]]":
        """Replicas whose counts are awaited, or a scrape. What it shows is kept first: no collector shows less."""
        from scale.totals import to_json

        await self._measure()
        if awaited := self._collector.awaited():
            return awaited, []
        families = self._collector.metrics()
        self._save()
        self._kept.put(SHOWN, json.dumps(to_json(self._collector.shown())).encode())
        return [], families

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
