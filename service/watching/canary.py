"""The canary: fixed images whose embeddings are known, trickled through the path that requests take.

They tell a broken model from unusual traffic. A few at a time fill room that batches of requests leave, or an engine
that has nothing to do, at a pace that keeps them to half a per cent of what the engine can do.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fullrank.verdict import CANARY_COSINE
from models.artifact import Canary
from models.embedder import normalize
from service.engine.engine import Encoder, Engine
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
SHARE = 0.005
# A request may arrive just after a few canary images were started alone; it waits for at most these.
FEW = 8
FEW_SECONDS = 0.005
TURN, PATIENCE = 0.05, 0.1  # seconds that many images embedded at once hold up a request, and wait for requests


async def embed_in_turns(engine: Engine, encoder: Encoder, pixels: Pixels) -> tuple[Rows, float]:
    """Rows (n, d) of (n, c, s, s) uint8 pixels and the seconds of their passes; requests go first.

    Some at a time, as many as take some `TURN` seconds, so that a request waits for no more than these.
    """
    rows = list[Rows]()
    seconds = 0.0
    few = 1
    at = 0
    while at < len(pixels):
        job = await engine.embed(encoder, pixels[at : at + few], observed=False, yields_for=PATIENCE)
        rows.append(job.rows.copy())
        seconds += job.forward_seconds
        at += few
        few = min(engine.queue.max_batch, max(1, int(few * min(4.0, TURN / max(job.forward_seconds, 1e-6)))))
    return np.concatenate(rows), seconds


class CanaryWatch:
    """Embeds an artifact's canary images over and over in small parts; what each embedded to last is in `rows` (m, d).

    rows: what all of them embedded to just now, in `seconds` of forward passes. cycle: seconds from one embedding of an
    image to its next: `period`, or as long as keeps the images to `SHARE` of the engine's time.
    """

    def __init__(self, canary: Canary, rows: Rows, seconds: float, metrics: Metrics, period: float) -> None:
        self._images = canary.images.numpy()
        self._expected = normalize(canary.embeddings.double())
        self._metrics = metrics
        self._period = period
        self.rows = rows
        seconds = max(seconds, 1e-6)
        self.cycle = max(period, seconds / SHARE)
        self.few = min(FEW, max(1, int(FEW_SECONDS * len(self._images) / seconds)))

    async def trickle(self, engine: Engine, encoder: Encoder, record: Callable[[Rows], None], every: float) -> None:
        """For ever: embed a few; `record` all rows (m, d) as they now are, `every` so often and once one is off.

        Images that could not be embedded for a period are off: their rows become NaN.
        """
        n = len(self._images)
        alarmed = False
        due = time.monotonic() + every
        failing_since: float | None = None
        while True:
            for start in range(0, n, self.few):
                part = slice(start, min(start + self.few, n))
                pause = self.cycle * (part.stop - start) / n
                await asyncio.sleep(pause)
                if await self._embed(engine, encoder, part, pause):
                    failing_since = None
                else:
                    failing_since = failing_since or time.monotonic()
                    if time.monotonic() < failing_since + self._period:
                        continue
                    self.rows[part] = np.nan
                was = alarmed
                alarmed = self.least_cosine(part) < CANARY_COSINE
                if alarmed > was or time.monotonic() >= due:
                    record(self.rows)
                    due = time.monotonic() + every

    async def _embed(self, engine: Engine, encoder: Encoder, part: slice, pause: float) -> bool:
        """Embed some of them again; False if that failed, or took longer than a period."""
        images = self._images[part]
        deadline = time.monotonic() + pause + self._period
        try:
            # An engine whose batches are always full makes room after a pause, or it would run unwatched.
            job = await engine.embed(encoder, images, deadline, observed=False, yields_for=pause)
        except Exception as error:
            self._metrics.canary["failed"].inc(len(images))
            log.error("canary images could not be embedded: %s", error or type(error).__name__)
            return False
        self.rows[part] = job.rows
        finite = int(np.isfinite(job.rows).all(axis=1).sum())
        self._metrics.canary["finite"].inc(finite)
        self._metrics.canary["nonfinite"].inc(len(job.rows) - finite)
        return True

    def least_cosine(self, part: slice = slice(None)) -> float:
        """The least cosine of an image's embedding to its stored one; -1 if any is not finite."""
        return least_cosine(self.rows[part], self._expected[part].numpy())


def least_cosine(rows: Rows, expected: NDArray[np.float64] | Rows) -> float:
    """Between rows (n, d) and those expected, row by row; -1 if any is not finite or has no direction."""
    unit, wanted = (normalize(torch.from_numpy(np.asarray(it, np.float64))) for it in (rows, expected))
    return float((unit * wanted).sum(1).nan_to_num(nan=-1.0).min())
