"""Two lanes take turns on the device: while one runs a batch, the other decodes the next.

Each lane is a thread that takes what waits, decodes it, adds what arrives until the device is free, runs the batch and
hands the rows back. So a request costs two changes of thread, whatever its images go through, and one batch, never
more, is ready ahead of the device. Nobody waits for a timer. Images that may take long to decode leave the lane for
processes of their own (pool.py) and come back to a later batch.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from models.embedder import faulty, normalize
from service.engine.pool import Apart, Pool
from service.engine.queue import Job, Part, Pixels, Queue, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
T = TypeVar("T")
LANES = 2
FEW = 4  # images that one thread decodes before a second is worth waking
# Of CPU and of memory, for one image that is decoded apart.
DECODE_SECONDS = 5.0
DECODE_MEMORY = 2**29
ENDING = 5.0  # seconds that a thread gets to end; one that a forward pass holds longer ends with the process


class Encoder(Protocol):
    """What the engine asks of an encoder, and where its answers go besides the client."""

    def decode(self, image: Any) -> Pixels | Apart:
        """An image as a request brought it -> (c, s, s) uint8. What this raises fails its request, and no other.

        Returns within some twenty milliseconds: an image that may take longer is to be decoded apart.
        """

    def embed(self, pixels: Pixels) -> Rows:
        """(n, c, s, s) uint8 -> (n, d) float32, not normalised."""

    def on_embedded(self, pixels: Pixels, rows: Rows) -> None:
        """Called once the rows are on their way to their clients; must return at once."""


class Batch:
    """Decoded parts of requests, side by side in memory that a device can copy from."""

    def __init__(self, capacity: int, *, pinned: bool) -> None:
        self._capacity = capacity
        self._pinned = pinned
        self._buffer: Pixels | None = None
        self.parts: list[Part] = []
        self.size = 0

    def add(self, part: Part, images: Sequence[Pixels]) -> None:
        """The part's images, (c, s, s) each."""
        if self._buffer is None:
            shape = (self._capacity, *images[0].shape)
            # Page-locked memory is what a CUDA device copies from while this thread does something else.
            own = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy() if self._pinned else None
            self._buffer = np.empty(shape, np.uint8) if own is None else own
        self.parts.append(part)
        for image in images:
            self._buffer[self.size] = image
            self.size += 1

    def pixels(self) -> Pixels:
        """(n, c, s, s) uint8 of the parts still wanted; the others are forgotten, so n may be 0."""
        assert self._buffer is not None
        pixels = self._buffer[: self.size]
        now = time.monotonic()
        wanted = [part.job.wanted(now) for part in self.parts]
        if not all(wanted):
            pixels = pixels[np.repeat(wanted, [len(part) for part in self.parts])]
            self.parts = [part for part, it in zip(self.parts, wanted, strict=True) if it]
        return pixels


class Engine:
    """Decodes and embeds jobs in batches, and runs any other torch work between two batches.

    threads: of one forward pass. decode_threads: of one batch's decoding, the lane's own among them, and processes for
    the images that may take long, each image at most decode_seconds of CPU and decode_memory bytes. pinned: batches lie
    in page-locked memory, for a CUDA device. Everything public runs on the event loop that the first job came on.
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
    ) -> None:
        self.queue = Queue(max_batch)
        self.failures = 0  # batches that failed since the last one that did not
        self._metrics = metrics
        self._pinned = pinned
        self._decode_threads = decode_threads
        self._threads = threads
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[Job] = set()  # that somebody waits for
        self._progress = time.monotonic()  # when a batch last ended
        self._running: dict[int, float] = {}  # since when each lane's batch is on the device
        # Conditions of one lock, so that a lane is woken only for what it waits for: images, or the device.
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._busy = 0  # lanes that have taken something
        self._idle: list[threading.Condition] = []  # of lanes that wait for images, who worked last at the end
        self._closing = False
        self._turns: deque[object] = deque()  # whose turn on the device it is, and who comes next
        self._filling = False  # a lane that waits for its turn has room for more images
        self._notifying = False
        self._helpers = ThreadPoolExecutor(max(1, decode_threads - 1), "decode")
        self._pool = Pool(
            decode_threads, decode_seconds, decode_memory, self._decoded_apart, metrics.killed_decoders.inc
        )
        self._lanes: list[threading.Thread] = []

    async def embed(
        self,
        encoder: Encoder,
        images: Pixels | Sequence[Any],
        deadline: float = math.inf,
        *,
        observed: bool = True,
        yields_for: float = 0.0,
    ) -> Job:
        """The finished job, with rows (n, d). Raises TimeoutError at `deadline`, in time.monotonic() seconds.

        Its images are dropped then, and when it is cancelled.

        images: (n, c, s, s) uint8, or a list for encoder.decode, whose exceptions come out here. For `yields_for`
        seconds the job only fills room that others leave.
        """
        loop = self._running_loop()
        job = Job(encoder, images, deadline, loop.create_future(), observed, time.monotonic() + yields_for)
        self._jobs.add(job)
        self.queue.put(job)
        self._notify_soon()
        timer = None if math.isinf(deadline) else loop.call_later(max(0.0, deadline - job.queued), _expire, job)
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
            # torch counts the threads of a pass per calling thread; one of them computes at a time, so never more.
            torch.set_num_threads(self._threads)
            self._queue_for_device(ticket := object())
            try:
                with self._held(ticket):
                    result = function(*arguments)
            except BaseException as error:
                self._call_on_loop(_settle, answer, None, error)
            else:
                self._call_on_loop(_settle, answer, result, None)

        # Not a pool's thread, which the interpreter would wait for at its end, however long this takes.
        threading.Thread(target=alone, name="call", daemon=True).start()
        return await answer

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the first job came on."""
        assert self._loop is not None, "no job came yet"
        return self._loop

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop; at the first call also start the lanes."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._lanes = [threading.Thread(target=self._lane, name=f"engine_{i}", daemon=True) for i in range(LANES)]
            for lane in self._lanes:
                lane.start()
        return self._loop

    def stalled(self) -> float:
        """Seconds for which work has waited while nothing ended: 0 without work."""
        now = time.monotonic()
        since = min([*self._running.copy().values(), *(job.queued for job in self._jobs)], default=now)
        return now - max(since, self._progress) if since < now else 0.0

    def dead_threads(self) -> list[str]:
        """Names of the threads that ended though the engine goes on."""
        return [] if self._closing else [lane.name for lane in self._lanes if not lane.is_alive()]

    async def close(self) -> None:
        """Finish what is queued and end the threads; those that a forward pass holds are left to the process's end."""
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
        await asyncio.to_thread(self._pool.close)
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _notify_soon(self) -> None:
        if not self._notifying:
            # Once for all that this turn of the loop brings: a lane woken by each would fight the loop for the GIL.
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
        """Let one idle lane look for work, with the lock held: the one that worked last, whose caches are warm."""
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
                self._call_on_loop(_fail, [part.job for part in taken], error)
            finally:
                with self._lock:
                    self._busy -= 1
                    self._freed.notify_all()

    def settle(self, seconds: float) -> bool:
        """Wait until no lane works any more, what it answered observed too; False if that takes longer. Blocks."""
        with self._freed:
            return self._freed.wait_for(lambda: not self._busy, seconds)

    def _serve(self, taken: list[Part]) -> None:
        """Decode and run parts, and add to them those that came meanwhile."""
        batch = Batch(self.queue.max_batch, pinned=self._pinned)
        self._decode(taken, batch)
        if not batch.parts:
            return
        with self._held(batch):
            while more := self._queue_for_device(batch, batch):
                taken.extend(more)
                self._decode(more, batch)
            pixels = batch.pixels()
            if not batch.parts:
                return
            self._running[threading.get_ident()] = time.monotonic()
            try:
                rows = self._run(batch, pixels)
            finally:
                del self._running[threading.get_ident()]
        # After the device is given up: the other lane's batch runs meanwhile.
        self._observe(batch, pixels, rows)

    def _call_on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits for an answer any more
            log.warning("an answer came after the end of the service")

    def _next(self, came: threading.Condition) -> list[Part]:
        """What waits, as soon as something does; empty to end."""
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
        """Wait for one's turn on the device: empty then. Until then, what else arrives for the batch."""
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
        """Give up one's turn at the end."""
        try:
            yield
        finally:
            with self._freed:
                if ticket in self._turns:
                    self._turns.remove(ticket)
                self._freed.notify_all()

    def _decode(self, parts: list[Part], batch: Batch) -> None:
        """Add parts to a batch, those of several threads' work decoded side by side; a bad one fails its job.

        Parts with images that may take long go to the pool, and those that nobody waits for any more are dropped.
        """
        started = time.monotonic()
        images = [(part.job, image) for part in parts for image in part.images]
        shares = min(self._decode_threads, math.ceil(len(images) / FEW))
        others = [self._helpers.submit(_decode_all, images[i::shares]) for i in range(1, shares)]
        decoded: list[Pixels | Apart | Exception | None] = [None] * len(images)
        decoded[::shares] = _decode_all(images[::shares])
        for i, other in enumerate(others, 1):
            decoded[i::shares] = other.result()
        seconds = time.monotonic() - started
        results = iter(decoded)
        for part in parts:
            own = [next(results) for _ in range(len(part))]
            part.job.decode_seconds += seconds
            if (error := next((it for it in own if isinstance(it, Exception)), None)) is not None:
                part.job.abandoned = True
                self._call_on_loop(_fail, [part.job], error)
            elif any(isinstance(it, Apart) for it in own):
                self._pool.put(part, own)
            elif all(it is not None for it in own):
                batch.add(part, [it for it in own if isinstance(it, np.ndarray)])

    def _decoded_apart(self, part: Part, result: list[Pixels] | Exception) -> None:
        """Take a part back from the pool, on one of its threads."""
        if isinstance(result, Exception):
            part.job.abandoned = True
            self._call_on_loop(_fail, [part.job], result)
            return
        self.queue.put_back(replace(part, decoded=result))
        self._call_on_loop(self._notify_soon)

    def _run(self, batch: Batch, pixels: Pixels) -> Rows:
        """Embed a batch's pixels and hand the rows to whom they belong."""
        encoder: Encoder = batch.parts[0].job.encoder
        started = time.monotonic()
        rows = embed_splitting(encoder, pixels)
        seconds = time.monotonic() - started
        self._progress = time.monotonic()
        self.failures = 0
        unit, bad = normalized(rows)
        complete = []
        start = 0
        for part in batch.parts:
            own = slice(start, start := start + len(part))
            if bad[own].any():
                part.job.faulty = part.start + int(bad[own].argmax())
            if part.job.store(part, rows[own], unit[own], started, seconds):
                complete.append(part.job)
        if complete:
            self._call_on_loop(_deliver, complete)
        return rows

    def _observe(self, batch: Batch, pixels: Pixels, rows: Rows) -> None:
        """Show the monitor what clients got."""
        observed = np.repeat([part.job.observed for part in batch.parts], [len(part) for part in batch.parts])
        if not observed.any():
            return
        self._metrics.batches.inc()
        self._metrics.batch_size.observe(len(pixels))
        try:
            encoder: Encoder = batch.parts[0].job.encoder
            encoder.on_embedded(*(pixels, rows) if observed.all() else (pixels[observed], rows[observed]))
        except Exception:
            log.exception("a batch of %d images could not be observed", len(pixels))


def normalized(rows: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """(n, d) rows with unit L2 norm, and which of them are no embedding: not finite, or without direction.

    In float64, as the monitor does: the square of a finite float32 need not be one.
    """
    made = torch.from_numpy(rows)
    return normalize(made).numpy(), faulty(made).numpy()


def _decode_all(images: list[tuple[Job, Any]]) -> list[Pixels | Apart | Exception | None]:
    """The pixels, or what was wrong with the image, or None once nobody waits for it."""
    decoded = list[Pixels | Apart | Exception | None]()
    for job, image in images:
        try:
            if not job.wanted(time.monotonic()):
                decoded.append(None)
            else:
                decoded.append(image if isinstance(image, np.ndarray) else job.encoder.decode(image))
        except Exception as error:
            decoded.append(error)
    return decoded


def _settle(answer: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def embed_splitting(encoder: Encoder, pixels: Pixels) -> Rows:
    """encoder.embed, in halves where the device's memory does not hold them at once."""
    try:
        return encoder.embed(pixels)
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    # Outside the handler, whose traceback would keep the failed pass's tensors alive.
    torch.cuda.empty_cache()
    half = len(pixels) // 2
    return np.concatenate([embed_splitting(encoder, pixels[:half]), embed_splitting(encoder, pixels[half:])])


def _deliver(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result(None)


def _expire(job: Job) -> None:
    _fail([job], TimeoutError())


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        job.abandoned = True
        if not job.answer.done():
            job.answer.set_exception(error)
