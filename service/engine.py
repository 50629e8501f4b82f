"""The one thread that runs torch: takes a batch, embeds it, hands the rows back, takes the next."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from service.batching import Job, Part, Pixels, Queue, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
T = TypeVar("T")


class Encoder(Protocol):
    """What the engine asks of an encoder, and where its answers go besides the client."""

    def embed(self, pixels: Pixels) -> Rows:
        """(n, c, s, s) uint8 -> (n, d) float32, not normalised."""

    def answered(self, pixels: Pixels, rows: Rows) -> None:
        """Called once the rows are on their way to their clients; must return at once."""


class Engine:
    """Runs jobs in batches on a thread of its own, and any other torch work between two batches."""

    def __init__(self, max_batch: int, threads: int, metrics: Metrics) -> None:
        self.queue = Queue(max_batch)
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "engine", initializer=torch.set_num_threads, initargs=(threads,))
        self._scheduled = False
        self._lock = threading.Lock()

    async def embed(
        self,
        encoder: Encoder,
        pixels: Pixels,
        deadline: float = math.inf,
        *,
        observed: bool = True,
        yields_for: float = 0.0,
    ) -> Job:
        """The finished job, with rows (n, d). Its images are dropped when cancelled or past `deadline` (monotonic).

        For `yields_for` seconds it only fills room that other jobs leave.
        """
        job = Job(encoder, pixels, deadline, self._loop.create_future(), observed, time.monotonic() + yields_for)
        self.queue.put(job)
        self._schedule()
        try:
            await job.answer
        finally:
            job.abandoned = True
        return job

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function on the engine's thread, between two batches."""
        return await self._loop.run_in_executor(self._thread, function, *arguments)

    async def close(self) -> None:
        """Finish what is queued and end the thread."""
        await asyncio.to_thread(self._thread.shutdown)

    def _schedule(self) -> None:
        with self._lock:
            if not self._scheduled:
                self._scheduled = True
                self._thread.submit(self._step)

    def _step(self) -> None:
        # Cleared before the queue is read: a job put in between schedules a step of its own, at worst an empty one.
        with self._lock:
            self._scheduled = False
        if batch := self.queue.take():
            self._schedule()
            try:
                self._run(batch)
            except Exception as error:
                log.exception("a batch of %d requests failed", len(batch))
                self._loop.call_soon_threadsafe(_fail, [part.job for part in batch], error)

    def _run(self, batch: list[Part]) -> None:
        encoder: Encoder = batch[0].job.encoder
        pixels = batch[0].pixels if len(batch) == 1 else np.concatenate([part.pixels for part in batch])
        started = time.monotonic()
        rows = embed_splitting(encoder, pixels)
        seconds = time.monotonic() - started
        complete, start = [], 0
        for part in batch:
            stop = start + part.stop - part.start
            if part.job.store(part, rows[start:stop], started, seconds):
                complete.append(part.job)
            start = stop
        if complete:
            self._loop.call_soon_threadsafe(_deliver, complete)
        observed = np.repeat([part.job.observed for part in batch], [part.stop - part.start for part in batch])
        if observed.any():
            self._metrics.batches.inc()
            self._metrics.batch_size.observe(len(pixels))
            everything = bool(observed.all())
            encoder.answered(*(pixels, rows) if everything else (pixels[observed], rows[observed]))


def embed_splitting(encoder: Encoder, pixels: Pixels) -> Rows:
    """encoder.embed, in halves where the device's memory does not hold them at once."""
    try:
        return encoder.embed(pixels)
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(pixels) // 2
        return np.concatenate([embed_splitting(encoder, pixels[:half]), embed_splitting(encoder, pixels[half:])])


def _deliver(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result(None)


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        job.abandoned = True
        if not job.answer.done():
            job.answer.set_exception(error)
