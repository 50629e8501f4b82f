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

from fullrank.verdict import CANARY_COSINE
from models.artifact import Artifact
from models.embedder import normalize
from service.engine.engine import Encoder, Engine
from service.engine.queue import Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
SHARE = 0.005
# A request may arrive just after a few canary images were started alone; it waits for at most these.
FEW, FEW_SECONDS = 8, 0.005


class CanaryWatch:
    """Embeds an artifact's canary images all at once, then over and over in small parts.

    cycle: seconds from one embedding of an image to its next: `period`, or as long as keeps the images to `SHARE` of
    the engine's time, going by what all of them took at first. rows: (m, d), what each image embedded to last.
    ValueError for an artifact without canary.
    """

    def __init__(self, artifact: Artifact, encoder: Encoder, engine: Engine, metrics: Metrics, period: float) -> None:
        if artifact.canary is None:
            raise ValueError(f"{artifact.card.name} has no canary images")
        self._images = artifact.canary.images.numpy()
        self._expected = normalize(artifact.canary.embeddings.double())
        self._encoder, self._engine, self._metrics, self._period = encoder, engine, metrics, period
        self.rows: Rows = np.empty((0, 0), np.float32)
        self.cycle, self.few = period, 1

    async def embed_all(self) -> float:
        """The least cosine of an image's embedding to its stored one; -1 if any is not finite."""
        job = await self._engine.embed(self._encoder, self._images, observed=False)
        self.rows = job.rows.copy()
        seconds = max(job.forward_seconds, 1e-6)
        self.cycle = max(self._period, seconds / SHARE)
        self.few = min(FEW, max(1, int(FEW_SECONDS * len(self._images) / seconds)))
        return self._least_cosine(slice(None))

    async def trickle(self, record: Callable[[Rows], None], every: float) -> None:
        """For ever: embed a few; `record` all rows (m, d) as they now are, `every` so often and once one is off."""
        n, alarmed, due = len(self._images), False, time.monotonic() + every
        while True:
            for start in range(0, n, self.few):
                part = slice(start, min(start + self.few, n))
                pause = self.cycle * (part.stop - start) / n
                await asyncio.sleep(pause)
                try:
                    # An engine whose batches are always full makes room after a pause, or it would run unwatched.
                    job = await self._engine.embed(self._encoder, self._images[part], observed=False, yields_for=pause)
                except Exception:
                    log.exception("the canary images could not be embedded")
                    continue
                self.rows[part] = job.rows
                finite = int(np.isfinite(job.rows).all(axis=1).sum())
                self._metrics.canary["finite"].inc(finite)
                self._metrics.canary["nonfinite"].inc(len(job.rows) - finite)
                was, alarmed = alarmed, self._least_cosine(part) < CANARY_COSINE
                if alarmed > was or time.monotonic() >= due:
                    record(self.rows)
                    due = time.monotonic() + every

    def _least_cosine(self, part: slice) -> float:
        cosines = (normalize(torch.from_numpy(self.rows[part]).double()) * self._expected[part]).sum(1)
        return float(cosines.nan_to_num(nan=-1.0).min())
