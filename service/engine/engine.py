"""The engine: it batches requests, decodes their images and runs the encoder, on one or two threads called lanes.

While one lane runs a batch on the device, the other, if there is one, decodes the next. A lane takes the waiting
images, decodes them, adds those that arrive until the device is free, runs the batch and hands the rows back. So a
request changes thread twice, and at most one batch is ready ahead of the device. No request waits for a timer. Images
that may take long to decode leave the lane for separate processes (pool.py) and join a later batch.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from service.engine.answers import deliver, expire, fail, settle
from service.engine.batch import Batch, Encoder, embed_splitting, normalized
from service.engine.decoding import Decoder
from service.engine.queue import Job, Part, Pixels, Queue, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
T = TypeVar("T")
LANES = 2
DECODE_SECONDS = 5.0  # of CPU, for one image that is decoded in a process of its own
DECODE_MEMORY = 2**29  # bytes, for the same
ENDING = 5.0  # seconds to wait for a thread at shutdown; one that is still in a forward pass ends with the process


class Engine:
    """Decodes and embeds jobs in batches, and runs any other torch work between two batches.

    threads: CPU threads of one forward pass. decode_threads: threads that decode one batch, the lane's own included;
    also the number of processes for images that may take long. Such an image may take at most decode_seconds of CPU and
    decode_memory bytes. pinned: batches lie in page-locked memory, for a CUDA device. lanes: batches in work at a time.
    All public methods run on the event loop that the first job came on.
    """

    def __init__(
        self,
        max_batch: int,
        threads: int,
        metrics: Metrics,
        decode_threads: int = 1,
        *,
        decode_seconds: float = DECODE_SECONDS,
        decode_memory: int = DECODE_MEMORY,
        pinned: bool = False,
        lanes: int = LANES,
    ) -> None:
        self.queue = Queue(max_batch)
        self.failures = 0  # failed batches since the last successful one
        self._metrics = metrics
        self._pinned = pinned
        self._lane_count = lanes
        self._threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[Job] = set()  # unfinished jobs
        self._progress = time.monotonic()  # when a batch last ended
        self._running: dict[int, float] = {}  # when each lane's batch came on the device
        # Two conditions on one lock: a lane is woken only for what it waits for, images or the device.
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._busy = 0  # number of lanes that hold a batch
        self._idle: list[threading.Condition] = []  # lanes that wait for images; the one that worked last is at the end
        self._closing = False
        self._turns: deque[object] = deque()  # the lane that has the device first, then the next
        self._filling = False  # whether a lane that waits for the device has room for more images
        self._notifying = False
        killed = metrics.killed_decoders.inc
        self._decoder = Decoder(decode_threads, decode_seconds, decode_memory, self._put_back, self._failed, killed)
        self._lanes: list[threading.Thread] = []

    async def embed(
        self,
        encoder: Encoder,
        images: Pixels | Sequence[Any],
        deadline: float = math.inf,
        *,
        observed: bool = True,
        yields_for: float = 0.0,
        client: int = 0,
    ) -> Job:
        """Embed images; returns the finished job, with rows (n, d).

        images: (n, c, s, s) uint8, or a list of images for encoder.decode, whose exceptions this raises too. deadline:
        in time.monotonic() seconds. yields_for: seconds in which the job only fills room that others leave in a batch.
        client: whose images they are, for the sample that the monitor gets.

        Raises TimeoutError at the deadline. The images are dropped then, and also when this call is cancelled.
        """
        loop = self._running_loop()
        job = Job(encoder, images, deadline, loop.create_future(), observed, time.monotonic() + yields_for, client)
        self._jobs.add(job)
        self.queue.put(job)
        self._notify_soon()
        timer = None if math.isinf(deadline) else loop.call_later(max(0.0, deadline - job.queued), expire, job)
        try:
            await job.answer
        finally:
            job.abandoned = True
            self._jobs.discard(job)
            if timer is not None:
                timer.cancel()
        return job

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function between two batches."""
        answer: asyncio.Future[T] = self._running_loop().create_future()

        def alone() -> None:
            # torch sets the number of threads per calling thread. Only one calling thread computes at a time.
            torch.set_num_threads(self._threads)
            self._queue_for_device(ticket := object())
            try:
                with self._held(ticket):
                    result = function(*arguments)
            except BaseException as error:
                self._call_on_loop(settle, answer, None, error)
            else:
                self._call_on_loop(settle, answer, result, None)

        # Not a thread of an executor: the interpreter would wait for that at its end, however long it takes.
        threading.Thread(target=alone, name="call", daemon=True).start()
        return await answer

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the first job came on."""
        assert self._loop is not None, "no job came yet"
        return self._loop

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The running event loop. The first call also starts the lanes."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            names = (f"engine_{i}" for i in range(self._lane_count))
            self._lanes = [threading.Thread(target=self._lane, name=name, daemon=True) for name in names]
            for lane in self._lanes:
                lane.start()
        return self._loop

    def stalled(self) -> float:
        """Seconds for which work has waited while no batch finished; 0 without work."""
        now = time.monotonic()
        since = min([*self._running.copy().values(), *(job.queued for job in self._jobs)], default=now)
        return now - max(since, self._progress) if since < now else 0.0

    def dead_threads(self) -> list[str]:
        """Names of the threads that ended though the engine was not closed."""
        return [] if self._closing else [lane.name for lane in self._lanes if not lane.is_alive()]

    async def close(self) -> None:
        """Finish the queued jobs and end the threads. A thread stuck in a forward pass ends with the process."""
        with self._lock:
            self._closing = True
            while self._idle:
                self._wake()
        ends = time.monotonic() + ENDING
        for lane in self._lanes:
            while lane.is_alive() and time.monotonic() < ends:
                await asyncio.to_thread(lane.join, 0.1)
            if lane.is_alive():
                log.error("%s is still busy with a batch and is left behind", lane.name)
        await asyncio.to_thread(self._decoder.close)

    def _notify_soon(self) -> None:
        if not self._notifying:
            # Once for all jobs of this turn of the loop: a lane woken by each would compete with the loop for the GIL.
            self._notifying = True
            self._running_loop().call_soon(self._notify)

    def _notify(self) -> None:
        self._notifying = False
        with self._lock:
            if self._filling:
                self._freed.notify_all()
            else:
                self._wake()

    def _wake(self) -> None:
        """Wake one idle lane: the one that worked last, because its caches are warm. The caller holds the lock."""
        if self._idle:
            self._idle.pop().notify()

    def _lane(self) -> None:
        torch.set_num_threads(self._threads)
        came = threading.Condition(self._lock)
        while taken := self._next(came):
            try:
                self._serve(taken)
            except Exception as error:
                log.exception("a batch of %d requests failed", len(taken))
                self.failures += 1
                self._metrics.failed_batches.inc()
                self._call_on_loop(fail, [part.job for part in taken], error)
            finally:
                taken = []  # an idle lane would keep its last parts, and with them an encoder that has left
                with self._lock:
                    self._busy -= 1
                    self._freed.notify_all()

    def settle(self, seconds: float) -> bool:
        """Wait until no lane works and all answers were observed; False if `seconds` pass before that. Blocks."""
        with self._freed:
            return self._freed.wait_for(lambda: not self._busy, seconds)

    def _serve(self, taken: list[Part]) -> None:
        """Decode parts, add those that arrive meanwhile, and run the batch."""
        batch = Batch(self.queue.max_batch, pinned=self._pinned)
        self._decoder.decode(taken, batch)
        if not batch.parts:
            return
        with self._held(batch):
            while more := self._queue_for_device(batch, batch):
                taken.extend(more)
                self._decoder.decode(more, batch)
            pixels = batch.pixels()
            if not batch.parts:
                return
            self._running[threading.get_ident()] = time.monotonic()
            try:
                rows = self._run(batch, pixels)
            finally:
                del self._running[threading.get_ident()]
        # Only now, after the device was released: the other lane's batch runs meanwhile.
        self._observe(batch, pixels, rows)

    def _put_back(self, part: Part) -> None:
        """Queue a part again, once its slow images are decoded. For any thread."""
        self.queue.put_back(part)
        self._call_on_loop(self._notify_soon)

    def _failed(self, job: Job, error: Exception) -> None:
        """Give a job up with an error. For any thread."""
        self._call_on_loop(fail, [job], error)

    def _call_on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: no client waits for an answer any more
            log.warning("an answer came after the end of the service")

    def _next(self, came: threading.Condition) -> list[Part]:
        """Wait for parts and return them. An empty list means that the lane should end."""
        with came:
            while not (parts := self.queue.take()):
                if self._closing:
                    break
                self._idle.append(came)
                came.wait()
            self._busy += bool(parts)
            if self.queue:
                self._wake()
        return parts

    def _queue_for_device(self, ticket: object, batch: Batch | None = None) -> list[Part]:
        """Wait for the device. Returns parts that arrive for the batch meanwhile; empty when the device is free."""
        with self._freed:
            if ticket not in self._turns:
                self._turns.append(ticket)
            while self._turns[0] is not ticket:
                room = 0 if batch is None else self.queue.max_batch - batch.size
                if batch is not None and room and (parts := self.queue.take(room, batch.parts[0].job.encoder)):
                    return parts
                self._filling = room > 0
                self._freed.wait()
                self._filling = False
        return []

    @contextmanager
    def _held(self, ticket: object) -> Iterator[None]:
        """Release the turn on the device at the end of the with block."""
        try:
            yield
        finally:
            with self._freed:
                if ticket in self._turns:
                    self._turns.remove(ticket)
                self._freed.notify_all()

    def _run(self, batch: Batch, pixels: Pixels) -> Rows:
        """Embed a batch's pixels and hand each job its rows."""
        encoder: Encoder = batch.parts[0].job.encoder
        started = time.monotonic()
        rows = embed_splitting(encoder, pixels)
        seconds = time.monotonic() - started
        self._progress = time.monotonic()
        self.failures = 0
        unit, bad = normalized(rows)
        faulty = bad.any()
        complete = []
        start = 0
        for part in batch.parts:
            own = slice(start, start := start + len(part))
            if faulty and bad[own].any():
                part.job.faulty = part.start + int(bad[own].argmax())
            if part.job.store(part, rows[own], unit[own], started, seconds):
                complete.append(part.job)
        if complete:
            self._call_on_loop(deliver, complete)
        return rows

    def _observe(self, batch: Batch, pixels: Pixels, rows: Rows) -> None:
        """Give the monitor the rows that clients got."""
        sizes = [len(part) for part in batch.parts]
        observed = np.repeat([part.job.observed for part in batch.parts], sizes)
        if not observed.any():
            return
        self._metrics.batches.inc()
        self._metrics.batch_size.observe(len(pixels))
        try:
            encoder: Encoder = batch.parts[0].job.encoder
            clients = np.repeat([part.job.client for part in batch.parts], sizes)
            made = pixels, rows, clients
            encoder.on_embedded(*(made if observed.all() else (it[observed] for it in made)))
        except Exception:
            log.exception("a batch of %d images could not be observed", len(pixels))
