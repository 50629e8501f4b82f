"""Two lanes take turns on the device: while one runs a batch, the other decodes the next.

Each lane is a thread that takes what waits, decodes it, adds what arrives until the device is free, runs the batch and
hands the rows back. So a request costs two changes of thread, whatever its images go through, and one batch, never
more, is ready ahead of the device. Nobody waits for a timer. Where a CPU embeds images faster than threads hand them
over, the event loop's own thread is the lane.
"""

import asyncio
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from models.embedder import normalize
from service.engine.queue import Job, Part, Pixels, Queue, Rows
from service.metrics import Metrics

log = logging.getLogger("fullrank.service")
T = TypeVar("T")
LANES = 2
FEW = 4  # images that one thread decodes before a second is worth waking
# Seconds of an image's work: below, waking a lane and sharing the interpreter with it costs more than the work itself.
HANDOVER = 0.0005
# Seconds of such work between two looks at the sockets: uvloop accepts one connection at each look.
TURN = 0.002


class Encoder(Protocol):
    """What the engine asks of an encoder, and where its answers go besides the client."""

    def decode(self, image: Any, *, quick: bool = False) -> Pixels | None:
        """An image as a request brought it -> (c, s, s) uint8. What this raises fails its request, and no other.

        None if it is to be `quick` and cannot: it will be asked again, with time.
        """

    def embed(self, pixels: Pixels) -> Rows:
        """(n, c, s, s) uint8 -> (n, d) float32, not normalised."""

    def answered(self, pixels: Pixels, rows: Rows) -> None:
        """Called once the rows are on their way to their clients; must return at once."""


class Batch:
    """Decoded parts of requests, side by side in memory that a device can copy from."""

    def __init__(self, capacity: int, *, pinned: bool) -> None:
        self._capacity, self._pinned = capacity, pinned
        self._buffer: Pixels | None = None
        self.parts: list[Part] = []
        self.size = 0
        self.seconds = 0.0  # of work that it took, not counting what its threads waited

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
        pixels, now = self._buffer[: self.size], time.monotonic()
        wanted = [part.job.wanted(now) for part in self.parts]
        if not all(wanted):
            pixels = pixels[np.repeat(wanted, [len(part) for part in self.parts])]
            self.parts = [part for part, it in zip(self.parts, wanted, strict=True) if it]
        return pixels


class Engine:
    """Decodes and embeds jobs in batches, and runs any other torch work between two batches.

    threads: of one forward pass. decode_threads: of one batch's decoding, the lane's own among them. pinned: batches
    lie in page-locked memory, for a CUDA device. Made on the event loop that everything public then runs on.
    """

    def __init__(
        self, max_batch: int, threads: int, metrics: Metrics, decode_threads: int = 1, *, pinned: bool = False
    ) -> None:
        self.queue = Queue(max_batch)
        self._metrics, self._pinned, self._decode_threads = metrics, pinned, decode_threads
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
        torch.set_num_threads(threads)  # of this thread, like each lane
        # Seconds of one image's work lately, by encoder.
        self._costs: weakref.WeakKeyDictionary[Encoder, float] = weakref.WeakKeyDictionary()
        self._put_off: deque[list[Part]] = deque()  # taken by the loop's thread, but not quick enough for it
        # Conditions of one lock, so that a lane is woken only for what it waits for: images, or the device.
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._idle: list[threading.Condition] = []  # of lanes that wait for images, who worked last at the end
        self._closing = False
        self._turns: deque[object] = deque()  # whose turn on the device it is, and who comes next
        self._filling = False  # a lane that waits for its turn has room for more images
        self._notifying = False
        self._helpers = ThreadPoolExecutor(max(1, decode_threads - 1), "decode")
        # torch counts the threads of a pass per calling thread; one of them computes at a time, so never more.
        self._caller = ThreadPoolExecutor(1, "call", initializer=torch.set_num_threads, initargs=(threads,))
        self._lanes = [
            threading.Thread(target=self._lane, args=(threads,), name=f"engine_{i}", daemon=True) for i in range(LANES)
        ]
        for lane in self._lanes:
            lane.start()

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
        job = Job(encoder, images, deadline, self._loop.create_future(), observed, time.monotonic() + yields_for)
        self.queue.put(job)
        self._notify_soon()
        timer = None if math.isinf(deadline) else self._loop.call_later(max(0.0, deadline - job.queued), _expire, job)
        try:
            await job.answer
        finally:
            job.abandoned = True
            if timer is not None:
                timer.cancel()
        return job

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function between two batches."""

        def alone() -> T:
            self._queue_for_device(ticket := object())
            with self._held(ticket):
                return function(*arguments)

        return await self._loop.run_in_executor(self._caller, alone)

    async def close(self) -> None:
        """Finish what is queued and end the threads."""
        with self._lock:
            self._closing = True
            while self._idle:
                self._wake()
        for lane in self._lanes:
            await asyncio.to_thread(lane.join)
        await asyncio.to_thread(self._caller.shutdown)
        self._helpers.shutdown()

    def _notify_soon(self) -> None:
        if not self._notifying:
            # Once for all that this turn of the loop brings: a lane woken by each would fight the loop for the GIL.
            self._notifying = True
            self._loop.call_soon(self._notify)

    def _notify(self) -> None:
        self._notifying = False
        if self._serve_here() and not self._put_off:
            if self.queue:
                self._notify_soon()  # after what else came in the meantime
            return
        with self._lock:
            if self._filling:
                self._freed.notify_all()
            else:
                self._wake()

    def _wake(self) -> None:
        """Let one idle lane look for work, with the lock held: the one that worked last, whose caches are warm."""
        if self._idle:
            self._idle.pop().notify()

    def _serve_here(self) -> bool:
        """Serve some of what waits on the loop's own thread, if that is cheaper than waking a lane; False if not."""
        encoder = self.queue.first()
        cost = math.inf if encoder is None or self._pinned else self._costs.get(encoder, math.inf)
        if cost > HANDOVER:
            return False
        with self._freed:
            if self._turns:
                return False
            self._turns.append(batch := Batch(self.queue.max_batch, pinned=False))
        with self._held(batch):
            taken = self.queue.take(min(self.queue.max_batch, math.ceil(TURN / max(cost, 1e-6))), encoder)
            with self._failing(taken):
                self._decode(taken, batch, quick=True)
                if batch.parts:
                    self._run(batch)
        return bool(taken)

    def _lane(self, threads: int) -> None:
        torch.set_num_threads(threads)
        came = threading.Condition(self._lock)
        while taken := self._next(came):
            with self._failing(taken):
                self._serve(taken)

    def _serve(self, taken: list[Part]) -> None:
        """Decode and run parts, and add to them those that came meanwhile."""
        batch = Batch(self.queue.max_batch, pinned=self._pinned)
        self._decode(taken, batch)
        if batch.parts:
            with self._held(batch):
                while more := self._queue_for_device(batch, batch):
                    taken.extend(more)
                    self._decode(more, batch)
                self._run(batch)

    @contextmanager
    def _failing(self, taken: list[Part]) -> Iterator[None]:
        """Fail the jobs of a batch with what stops it; the thread goes on."""
        try:
            yield
        except Exception as error:
            log.exception("a batch of %d requests failed", len(taken))
            self._tell(_fail, [part.job for part in taken], error)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call on the event loop."""
        if threading.get_ident() == self._loop_thread:
            function(*arguments)
        else:
            self._loop.call_soon_threadsafe(function, *arguments)

    def _next(self, came: threading.Condition) -> list[Part]:
        """What waits, as soon as something does; empty to end."""
        with came:
            while not (parts := self._put_off.popleft() if self._put_off else self.queue.take()):
                if self._closing:
                    break
                self._idle.append(came)
                came.wait()
            if self.queue or self._put_off:
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
                self._turns.remove(ticket)
                self._freed.notify_all()

    def _decode(self, parts: list[Part], batch: Batch, *, quick: bool = False) -> None:
        """Add parts to a batch, those of several threads' work decoded side by side; a bad one fails its job.

        Parts that cannot be decoded quickly, where that is asked, are put off for a lane.
        """
        started = time.monotonic()
        images = [(part.job.encoder, image) for part in parts for image in part.images]
        shares = 1 if quick else min(self._decode_threads, math.ceil(len(images) / FEW))
        others = [self._helpers.submit(_decode_all, images[i::shares], quick) for i in range(1, shares)]
        decoded: list[Pixels | Exception | None] = [None] * len(images)
        decoded[::shares], work = _decode_all(images[::shares], quick)
        for i, other in enumerate(others, 1):
            decoded[i::shares], more = other.result()
            work += more
        batch.seconds += work
        seconds, results, slow = time.monotonic() - started, iter(decoded), list[Part]()
        for part in parts:
            own = [next(results) for _ in range(len(part))]
            part.job.decode_seconds += seconds
            if (error := next((it for it in own if isinstance(it, Exception)), None)) is not None:
                part.job.abandoned = True
                self._tell(_fail, [part.job], error)
            elif any(it is None for it in own):
                slow.append(part)
            else:
                batch.add(part, [it for it in own if isinstance(it, np.ndarray)])
        if slow:
            self._put_off.append(slow)
            self._costs[slow[0].job.encoder] = 4 * HANDOVER  # so that the next few batches are the lanes' at once

    def _run(self, batch: Batch) -> None:
        pixels = batch.pixels()
        if not batch.parts:
            return
        encoder: Encoder = batch.parts[0].job.encoder
        started, worked = time.monotonic(), time.thread_time()
        rows = embed_splitting(encoder, pixels)
        seconds, batch.seconds = time.monotonic() - started, batch.seconds + time.thread_time() - worked
        # For the whole batch and here: on the loop's thread, numpy would hand the GIL over once a request.
        unit, finite = normalize(torch.from_numpy(rows)).numpy(), np.asarray(np.isfinite(rows).all(axis=1))
        complete, start = [], 0
        for part in batch.parts:
            own = slice(start, start := start + len(part))
            if not finite[own].all():
                part.job.nonfinite = part.start + int(finite[own].argmin())
            if part.job.store(part, rows[own], unit[own], started, seconds):
                complete.append(part.job)
        if complete:
            self._tell(_deliver, complete)
        observed = np.repeat([part.job.observed for part in batch.parts], [len(part) for part in batch.parts])
        if observed.any():
            cost = batch.seconds / len(pixels)
            self._costs[encoder] = 0.9 * self._costs.get(encoder, cost) + 0.1 * cost
            self._metrics.batches.inc()
            self._metrics.batch_size.observe(len(pixels))
            try:
                encoder.answered(*(pixels, rows) if observed.all() else (pixels[observed], rows[observed]))
            except Exception:
                log.exception("a batch of %d images could not be observed", len(pixels))


def _decode_all(images: list[tuple[Encoder, Any]], quick: bool) -> tuple[list[Pixels | Exception | None], float]:
    """The pixels, or what was wrong with the image, or None if it could not be quick; the seconds of work."""
    started, decoded = time.thread_time(), list[Pixels | Exception | None]()
    for encoder, image in images:
        try:
            decoded.append(image if isinstance(image, np.ndarray) else encoder.decode(image, quick=quick))
        except Exception as error:
            decoded.append(error)
    return decoded, time.thread_time() - started


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
