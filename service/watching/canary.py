"""The canary: fixed images with known embeddings, which are embedded again and again on the path that requests take.

They tell a broken model from unusual traffic. They are embedded a few at a time, in room that batches of requests
leave, or while the engine is idle. Their pace keeps them to 0.5 % of the engine's time.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from fullrank.canary import CanaryReader
from fullrank.wording import words_of
from models.artifact import Canary
from models.embedder import least_cosine, normalize
from models.gate import PRECISION_IMAGES
from service.engine.batch import Encoder
from service.engine.engine import Engine
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
SHARE = 0.005
# Canary images embedded together, at most, and the seconds of their pass. A request that arrives then waits for it.
IMAGES_TOGETHER = 8
SECONDS_TOGETHER = 0.005
TURN = 0.05  # seconds of one pass of embed_in_turns, for which a request may have to wait
PATIENCE = 0.1  # seconds for which images of embed_in_turns give way to requests


async def embed_in_turns(engine: Engine, encoder: Encoder, pixels: Pixels) -> tuple[Rows, float]:
    """Embed many images in small batches, so that requests go first.

    pixels: (n, c, s, s) uint8. Returns rows (n, d) and the seconds of all forward passes. A batch is as large as takes
    about `TURN` seconds: a request waits for no more than that.
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


async def noise_of(
    engine: Engine, encoder: Encoder, exact: Encoder | None, pixels: Pixels, rows: Rows, seconds: float
) -> float:
    """The largest angle, in degrees, by which the serving precision itself turns an embedding.

    pixels: (n, c, s, s) uint8, rows (n, d) what the encoder made of them in `seconds` of small batches. As many as take
    about `TURN` seconds are embedded again in one batch, and where `exact` is given, the same encoder in float32, some
    by that. An encoder that takes longer for one image sees no other batch than the first.
    """
    some = min(len(pixels), PRECISION_IMAGES)
    few = min(some, engine.queue.max_batch, max(1, int(TURN * len(pixels) / max(seconds, 1e-6))))
    job = await engine.embed(encoder, pixels[:few], observed=False, yields_for=PATIENCE)
    again = [job.rows.copy()]
    if exact is not None:
        again.append((await embed_in_turns(engine, exact, pixels[:some]))[0])
    angles = [
        CanaryReader(torch.from_numpy(rows[: len(it)].copy())).read(torch.from_numpy(it)).angle_degrees for it in again
    ]
    # NaN, an embedding that is not finite, is for the canary itself to find.
    return max((angle for angle in angles if math.isfinite(angle)), default=math.nan)


class CanaryWatch:
    """Embeds an artifact's canary images over and over, a few at a time. `rows` (m, d) holds their latest embeddings.

    rows: their first embeddings, which took `seconds` of forward passes. cycle: seconds between two embeddings of the
    same image. It is `period`, or longer where that would take more than `SHARE` of the engine's time. degrees: an
    image that turned by more is reported at once.
    """

    def __init__(
        self, canary: Canary, rows: Rows, seconds: float, metrics: Metrics, period: float, degrees: float
    ) -> None:
        self._images = canary.images.numpy()
        self._expected = normalize(canary.embeddings.double())
        self._metrics = metrics
        self._period = period
        self._least = math.cos(math.radians(degrees))
        self.rows = rows
        seconds = max(seconds, 1e-6)
        self.cycle = max(period, seconds / SHARE)
        self.few = min(IMAGES_TOGETHER, max(1, int(SECONDS_TOGETHER * len(self._images) / seconds)))

    async def trickle(self, engine: Engine, encoder: Encoder, record: Callable[[Rows], None], every: float) -> None:
        """Run for ever: embed a few canary images, and call `record` with all rows (m, d).

        record is called every `every` seconds, and at once when an image's embedding no longer matches its stored one.
        Images that could not be embedded for a period do not match: their rows become NaN.
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
                alarmed = self.least_cosine(part) < self._least
                if alarmed > was or time.monotonic() >= due:
                    record(self.rows)
                    due = time.monotonic() + every

    async def _embed(self, engine: Engine, encoder: Encoder, part: slice, pause: float) -> bool:
        """Embed some canary images again. False if that failed or took longer than a period."""
        images = self._images[part]
        deadline = time.monotonic() + pause + self._period
        try:
            # After a pause they no longer yield: an engine whose batches are always full would run unwatched.
            job = await engine.embed(encoder, images, deadline, observed=False, yields_for=pause)
        except Exception as error:
            self._metrics.canary["failed"].inc(len(images))
            log.error("canary images could not be embedded: %s", words_of(error))
            return False
        self.rows[part] = job.rows
        finite = int(np.isfinite(job.rows).all(axis=1).sum())
        self._metrics.canary["finite"].inc(finite)
        self._metrics.canary["nonfinite"].inc(len(job.rows) - finite)
        return True

    def least_cosine(self, part: slice = slice(None)) -> float:
        """The least cosine between a canary image's embedding and its stored one; -1 if any is not finite."""
        return least_cosine(self.rows[part], self._expected[part].numpy())
