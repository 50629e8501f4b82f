"""The queue of jobs, with greedy batching: the images that wait when the engine is free are the next batch.

No request waits for a timer. The number of pending images is bounded, so that a full service refuses requests at once
instead of queueing them without end. Nothing here knows torch or HTTP.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A batch takes one yielding image for each 8 of requests, so that it takes at most an eighth longer.
IMAGES_PER_YIELDING = 8
PACE = 0.005  # seconds between two refusals when there are many
LONGEST_HOLD = 1.0  # seconds that a refusal is held back at most
Pixels = NDArray[np.uint8]  # (n, channels, height, width)
Rows = NDArray[np.float32]  # (n, dimension)


class OverloadError(Exception):
    """There is no room for these images now. retry_after is in whole seconds."""

    def __init__(self, pending: int, limit: int, retry_after: int) -> None:
        super().__init__(f"{pending} of {limit} images pending")
        self.pending = pending
        self.limit = limit
        self.retry_after = retry_after


class Admission:
    """Counts images that are admitted and not yet answered. Only the event loop uses it, so it needs no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending = 0
        self._busy_seconds = self._finished = 0.0
        self._last = time.monotonic()
        self._next_refusal = 0.0

    def enter(self, images: int) -> None:
        """Reserve a place for each image until leave(). Raises OverloadError if they do not all fit."""
        if self.pending + images > self.limit:
            raise OverloadError(self.pending, self.limit, self.retry_after(images))
        self._tick()
        self.pending += images

    def leave(self, images: int) -> None:
        """Release the places."""
        self._tick()
        self.pending -= images
        self._finished += images

    def hold(self) -> float:
        """Seconds to hold the next refusal back: 0 for a few, at most LONGEST_HOLD, so that they leave PACE apart.

        Otherwise clients that retry at once would take time from those that are served.
        """
        now = time.monotonic()
        self._next_refusal = min(now + LONGEST_HOLD, max(now, self._next_refusal + PACE))
        return self._next_refusal - now

    def retry_after(self, images: int) -> int:
        """Whole seconds, 1 to 60, until this many places are free at the recent rate."""
        self._tick()
        excess = self.pending + images - self.limit
        return min(60, max(1, math.ceil(excess * self._busy_seconds / self._finished))) if self._finished else 1

    def _tick(self) -> None:
        now = time.monotonic()
        if self.pending:
            self._busy_seconds += now - self._last
        self._last = now
        if self._busy_seconds > 10.0:  # halve both, so that the rate is that of the last seconds of work
            self._busy_seconds = self._busy_seconds / 2
            self._finished = self._finished / 2


@dataclass(eq=False)
class Job:
    """One request's images for `encoder`, decoded or not, and their results. Times are in time.monotonic() seconds."""

    encoder: Any
    images: "Pixels | Sequence[Any]"
    deadline: float
    answer: "asyncio.Future[None]"
    observed: bool = True
    yields_until: float = -math.inf  # until then the job only fills room that others leave in a batch
    client: int = 0
    abandoned: bool = False
    queued: float = field(default_factory=time.monotonic)
    started: float = math.inf
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0
    rows: Rows = field(default_factory=lambda: np.empty((0, 0), np.float32))  # as the encoder made them
    unit: Rows = field(default_factory=lambda: np.empty((0, 0), np.float32))  # the same with unit L2 norm
    faulty: int | None = None  # index of an image whose row is no embedding: not finite, or all zero
    taken: int = 0
    done: int = 0

    @property
    def remaining(self) -> int:
        return len(self.images) - self.taken

    def wanted(self, now: float) -> bool:
        """Whether its client still waits for it."""
        return not self.abandoned and now < self.deadline

    def store(self, part: "Part", rows: Rows, unit: Rows, started: float, seconds: float) -> bool:
        """Store the rows of a part, embedded from `started` for `seconds`. True if they were the job's last."""
        if len(rows) == len(self.images):
            self.rows = rows
            self.unit = unit
        else:
            if not self.done:
                self.rows, self.unit = np.empty((2, len(self.images), rows.shape[1]), np.float32)
            self.rows[part.start : part.stop], self.unit[part.start : part.stop] = rows, unit
        self.done += len(rows)
        self.started = min(self.started, started)
        self.forward_seconds += seconds
        return self.done == len(self.images)


@dataclass(frozen=True, eq=False)
class Part:
    """Images [start, stop) of a job; `decoded` holds their pixels if the pool decoded them."""

    job: Job
    start: int
    stop: int
    decoded: "Sequence[Pixels] | None" = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def images(self) -> "Pixels | Sequence[Any]":
        return self.job.images[self.start : self.stop] if self.decoded is None else self.decoded


class Queue:
    """A queue of jobs that hands out batches of one encoder's images in arrival order. Thread-safe."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self._jobs: deque[Job] = deque()
        self._decoded: deque[Part] = deque()  # parts that the pool decoded
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._jobs) + len(self._decoded)

    def put(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)

    def put_back(self, part: Part) -> None:
        """Return a part that the pool has decoded. It goes to the front, for one of the next batches."""
        with self._lock:
            self._decoded.append(part)

    def take(self, room: int | None = None, encoder: Any = None) -> list[Part]:
        """The next batch, empty if nothing waits; or up to `room` images of `encoder`, to fill a batch up.

        Jobs that were abandoned or are past their deadline are dropped before any work. Each of the oldest jobs gets an
        equal share of the batch, and what smaller ones leave over. A job with images left goes to the back, so a large
        request slows small ones by at most its share. Jobs that yield get the room left in a large batch, or a batch of
        their own when nothing else waits.
        """
        with self._lock:
            now = time.monotonic()
            size = self.max_batch if room is None else room
            batch = self._take_decoded(size, encoder, now)
            waiting = [job for job in self._jobs if job.wanted(now)]
            if not waiting:
                self._jobs.clear()
                return batch
            requests = [job for job in waiting if now >= job.yields_until] or ([] if encoder or batch else waiting)
            encoder = encoder or (batch[0].job if batch else requests[0]).encoder
            room = size - sum(map(len, batch))
            chosen = [job for job in requests if job.encoder is encoder][:room]
            for sharers, job in zip(
                range(len(chosen), 0, -1), sorted(chosen, key=lambda job: job.remaining), strict=True
            ):
                take = min(job.remaining, room // sharers)
                batch.append(Part(job, job.taken, job.taken + take))
                job.taken += take
                room -= take
            served = set(map(id, chosen))
            for job in waiting:
                take = min(job.remaining, room, (size - room) // IMAGES_PER_YIELDING)
                if take and job.encoder is encoder and now < job.yields_until and id(job) not in served:
                    batch.append(Part(job, job.taken, job.taken + take))
                    job.taken += take
                    room -= take
            self._jobs = deque(job for job in waiting if id(job) not in served and job.remaining)
            self._jobs.extend(job for job in chosen if job.remaining)
            return batch

    def _take_decoded(self, room: int, encoder: Any, now: float) -> list[Part]:
        """Parts of one encoder that the pool decoded, as many as fit. The caller holds the lock."""
        batch = list[Part]()
        others = deque[Part]()
        for part in self._decoded:
            if not part.job.wanted(now):
                continue
            encoder = encoder or part.job.encoder
            if part.job.encoder is encoder and len(part) <= room:
                batch.append(part)
                room -= len(part)
            else:
                others.append(part)
        self._decoded = others
        return batch
