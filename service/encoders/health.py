"""Health checks of this replica: do its threads run, does its work finish, and does it succeed?"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fullrank.wording import words_of
from models import gate as gates
from service.encoders.served import Served
from service.engine.engine import Engine
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
FAILURES = 3  # batches in a row that must fail before the replica is unready
LOOK = 0.5  # seconds between two checks
PROBE = 5.0  # seconds between two attempts to embed while forward passes fail


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds.

    still: how long work may make no progress before the replica is unready. unfit: how long it may be unready before
    it is not alive.
    """

    still: float
    unfit: float


class Health:
    """Checks the engine twice a second. While forward passes fail, it tries to embed, to notice when they recover."""

    def __init__(
        self, engine: Engine, serving: Callable[[], Sequence[Served]], metrics: Metrics, limits: Limits
    ) -> None:
        self._engine = engine
        self._serving = serving
        self._limits = limits
        self._unfit_since: float | None = None
        self._probed = time.monotonic()
        metrics.unfit.set_function(lambda: float(self.fault() is not None))
        metrics.stalled.set_function(engine.stalled)
        metrics.dead_threads.set_function(lambda: float(len(self.dead_threads())))

    def fault(self) -> str | None:
        """Why the replica should get no requests; None if it can answer them."""
        if dead := self._engine.dead_threads():
            return f"{', '.join(dead)} ended; restart the service"
        if (still := self._engine.stalled()) > self._limits.still:
            return f"work has waited {still:.0f} s and none of it ends"
        if self._engine.failures >= FAILURES:
            return f"the last {self._engine.failures} forward passes failed; the log has the reasons"
        return None

    def dead_threads(self) -> list[str]:
        """Names of the threads, of the engine and of the monitors, that ended though the service still runs."""
        monitors = [it for it in self._serving() if it.monitor is not None and not it.monitor.running]
        return [*self._engine.dead_threads(), *(f"the monitor of {it}" for it in monitors)]

    def alive(self) -> bool:
        """False once the replica has been unfit for so long that only a restart can help."""
        return self._unfit_since is None or time.monotonic() < self._unfit_since + self._limits.unfit

    async def watch(self) -> None:
        """Run for ever: record since when the replica is unfit, log it, and try to embed while passes fail."""
        while True:
            await asyncio.sleep(LOOK)
            fault = self.fault()
            if fault is None:
                if self._unfit_since is not None:
                    log.info("fit to serve again")
                self._unfit_since = None
                continue
            if self._unfit_since is None:
                self._unfit_since = time.monotonic()
                log.error("not fit to serve: %s", fault)
            if self._engine.failures >= FAILURES and time.monotonic() > self._probed + PROBE:
                self._probed = time.monotonic()
                await self._probe()

    async def _probe(self) -> None:
        for served in self._serving():
            try:
                images = gates.synthetic(served.artifact.card.preprocessing)[-1:]
                await self._engine.embed(served, images, time.monotonic() + PROBE, observed=False)
            except Exception as error:
                log.error("%s does not embed: %s", served, words_of(error))
