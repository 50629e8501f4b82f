"""Greedy batching: whatever waits when the engine is free is the next batch; nobody waits for a timer.

Images are admitted against one bounded count, so that a full service says so at once instead of queueing in silence.
Nothing here knows torch or HTTP.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

RIDE = 8  # images of requests in a batch to each image that yields: at most an eighth more to wait for
Pixels = NDArray[np.uint8]  # (n, channels, height, width)
Rows = NDArray[np.float32]  # (n, dimension)


class OverloadError(Exception):
    """No room for these images now; retry_after is in whole seconds."""

    def __init__(self, pending: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{pending} of {limit} images pending")
        self.pending, self.limit, self.retry_after = pending, limit, retry_after


class Admission:
    """The count of images admitted and not yet answered. Used from the event loop only, hence no lock."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pending = limit, 0
        self._busy_seconds = self._finished = 0.0
        self._last = time.monotonic()

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold a place for each image; raises OverloadError when they do not all fit."""
        if self.pending + images > self.limit:
            raise OverloadError(self.pending, self.limit, self.retry_after(images))
        self._tick()
        self.pending += images
        try:
            yield
        finally:
            self._tick()
            self.pending -= images
            self._finished += images

    def retry_after(self, images: int) -> int:
        """Whole seconds, 1 to 60, until so many places are free at the rate at which images lately left."""
        self._tick()
        excess = self.pending + images - self.limit
        return min(60, max(1, math.ceil(excess * self._busy_seconds / self._finished))) if self._finished else 1

    def _tick(self) -> None:
        now = time.monotonic()
        if self.pending:
            self._busy_seconds += now - self._last
        self._last = now
        if self._busy_seconds > 10.0:  # forget, so that the rate is that of the last seconds of work
            self._busy_seconds, self._finished = self._busy_seconds / 2, self._finished / 2


@dataclass(eq=False)
class Job:
    """One request's images on their way through `encoder`; times are time.monotonic() seconds."""

    encoder: Any
    pixels: Pixels
    deadline: float
    answer: "asyncio.Future[None]"
    observed: bool = True
    yields_until: float = -math.inf  # before then it only fills room that others leave
    abandoned: bool = False
    queued: float = field(default_factory=time.monotonic)
    started: float = math.inf
    forward_seconds: float = 0.0
    rows: Rows = field(default_factory=lambda: np.empty((0, 0), np.float32))
    taken: int = 0
    done: int = 0

    @property
    def remaining(self) -> int:
        return len(self.pixels) - self.taken

    def store(self, part: "Part", rows: Rows, started: float, seconds: float) -> bool:
        """Keep a part's rows, embedded from `started` for `seconds`; True if these were the last."""
        if len(rows) == len(self.pixels):
            self.rows = rows
        else:
            if not self.done:
                self.rows = np.empty((len(self.pixels), rows.shape[1]), np.float32)
            self.rows[part.start : part.stop] = rows
        self.done += len(rows)
        self.started = min(self.started, started)
        self.forward_seconds += seconds
        return self.done == len(self.pixels)


@dataclass(frozen=True)
class Part:
    """Images [start, stop) of a job."""

    job: Job
    start: int
    stop: int

    @property
    def pixels(self) -> Pixels:
        return self.job.pixels[self.start : self.stop]


class Queue:
    """Jobs in arrival order, handed out as batches of one encoder's images. Thread-safe."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()

    def put(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)

    def take(self) -> list[Part]:
        """The next batch, empty if nothing waits. Jobs abandoned or past their deadline are dropped before any work.

        Each of the oldest jobs gets an equal share of the batch and what smaller ones leave over; a job with images
        left goes to the back, so that a large request slows small ones by at most its share. Jobs that yield get what
        room is left in a batch of many, or a batch of their own when nothing else waits.
        """
        with self._lock:
            now = time.monotonic()
            waiting = [job for job in self._jobs if not job.abandoned and now < job.deadline]
            if not waiting:
                self._jobs.clear()
                return []
            requests = [job for job in waiting if now >= job.yields_until] or waiting
            encoder = requests[0].encoder
            chosen = [job for job in requests if job.encoder is encoder][: self.max_batch]
            room, batch = self.max_batch, []
            for sharers, job in zip(
                range(len(chosen), 0, -1), sorted(chosen, key=lambda job: job.remaining), strict=True
            ):
                take = min(job.remaining, room // sharers)
                batch.append(Part(job, job.taken, job.taken + take))
                job.taken += take
                room -= take
            served = set(map(id, chosen))
            for job in waiting:
                take = min(job.remaining, room, (self.max_batch - room) // RIDE)
                if take and job.encoder is encoder and now < job.yields_until and id(job) not in served:
                    batch.append(Part(job, job.taken, job.taken + take))
                    job.taken += take
                    room -= take
            self._jobs = deque(job for job in waiting if id(job) not in served and job.remaining)
            self._jobs.extend(job for job in chosen if job.remaining)
            return batch
