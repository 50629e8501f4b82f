"""SpectrumMonitor: the spectrum of recent embeddings, measured beside the serving path and never in it."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fullrank.calibration.sequential import Evidence
from fullrank.moments import Moments, merge
from fullrank.monitor.blocks import GROUPS, Batch, Intake
from fullrank.monitor.refresh import Refresher
from fullrank.monitor.snapshot import Counters, Snapshot
from fullrank.reference import Reference
from fullrank.rows import ArrayLike, check_rows

logger = logging.getLogger(__name__)


class SpectrumMonitor:
    """Watches the embeddings that pass: `observe` copies rows into a bounded buffer, one daemon thread does the rest.

    dimension: width d of the rows; reference: a `Reference` of the same width, without which there are statistics and
    no verdict; windows: seconds, several at once; block_rows: rows to a block; buffer_rows: rows that may wait,
    beyond which they are dropped and counted; clock: seconds, for tests. The thread uses one core for its arithmetic
    and leaves the caller's torch threads as they are. Thread-safe. Close it, or use it in a `with`.

    ValueError for a dimension, window or block that is not positive and for a reference of another dimension.
    """

    def __init__(
        self,
        dimension: int,
        reference: Reference | None = None,
        windows: Sequence[float] = (300.0, 3600.0),
        block_rows: int = 256,
        clock: Callable[[], float] = time.monotonic,
        *,
        buffer_rows: int = 16384,
    ) -> None:
        if dimension < 1:
            raise ValueError(f"dimension: expected at least 1, got {dimension}")
        if not windows or not all(0 < seconds < math.inf for seconds in windows):
            raise ValueError(f"windows: expected positive seconds, got {tuple(windows)}")
        if block_rows < 2:
            raise ValueError(f"block_rows: expected at least 2, got {block_rows}")
        if reference is not None and reference.dimension != dimension:
            raise ValueError(f"reference: expected dimension {dimension}, got {reference.dimension}")
        self.dimension, self.reference, self.block_rows, self.buffer_rows = (
            dimension,
            reference,
            block_rows,
            buffer_rows,
        )
        self.windows = tuple(sorted(float(seconds) for seconds in set(windows)))
        self._clock = clock
        self._wake = threading.Condition()
        # Guarded by _wake: what callers hand over and what they read.
        self._pending: deque[Batch] = deque()
        self._pending_rows = self._tickets = self._served = 0
        self._canary_rows: Tensor | None = None
        self._closing = False
        self._input_width: int | None = None
        self._counters = Counters(band_energy=dict.fromkeys(reference.bands, 0.0) if reference else {})
        # Guarded by _state: what the worker accumulates.
        self._state = threading.Lock()
        self._intake = Intake(dimension, reference, self.windows, block_rows, clock, self._count)
        self._refresher = Refresher(dimension, reference, self.windows, clock)
        self._snapshot: Snapshot
        self._refresh(everything=True)
        threads, pinned = torch.get_num_threads(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pinned,), name="spectrum-monitor", daemon=True)
        self._thread.start()
        pinned.wait()
        # The worker's own set_num_threads(1) also became the default of threads yet to start: put that back.
        torch.set_num_threads(threads)

    def observe(
        self, rows: ArrayLike, keys: Sequence[bytes] | np.ndarray | None = None, inputs: ArrayLike | None = None
    ) -> None:
        """Hand over (n, d) embeddings, normalised or not; returns at once and never blocks on the statistics.

        keys: n content hashes, bytes or integers: rows with a key seen within the shortest window count as duplicates.
        inputs: (n, k) small descriptors of what was embedded, for the diversity of the traffic itself. ValueError names
        the argument that has the wrong shape, type or length.
        """
        tensor = torch.as_tensor(rows)
        check_rows(tensor, self.dimension, "rows")
        n = len(tensor)
        if keys is not None and len(keys) != n:
            raise ValueError(f"keys: expected {n}, one a row, got {len(keys)}")
        hashes = (
            None if keys is None else [hash(key) for key in (keys.tolist() if isinstance(keys, np.ndarray) else keys)]
        )
        descriptors = None
        if inputs is not None:
            descriptors = torch.as_tensor(inputs)
            check_rows(descriptors, self._input_width, "inputs")
            if len(descriptors) != n:
                raise ValueError(f"inputs: expected {n} rows, got {len(descriptors)}")
            descriptors = _copy(descriptors)
        batch = Batch(self._clock(), _copy(tensor), hashes, descriptors, _event(tensor))
        with self._wake:
            if descriptors is not None and self._input_width is None:
                self._input_width = descriptors.shape[1]
            room = 0 if self._closing else max(0, self.buffer_rows - self._pending_rows)
            self._counters.rows["dropped"] += max(0, n - room)
            if min(n, room):
                self._pending.append(batch if n <= room else batch.part(slice(0, room)))
                self._pending_rows += min(n, room)
            if self._pending_rows >= self.block_rows:
                self._wake.notify_all()

    def record_canary(self, embeddings: ArrayLike) -> None:
        """Hand over what the reference's canary images embed to now, (m, d). ValueError for another shape."""
        if self.reference is None or self.reference.canary is None:
            raise ValueError("canary: the reference has none")
        rows = torch.as_tensor(embeddings)
        check_rows(rows, self.dimension, "canary")
        if len(rows) != len(self.reference.canary):
            raise ValueError(f"canary: expected {len(self.reference.canary)} rows, got {len(rows)}")
        rows = rows.detach().to("cpu", torch.float32, copy=True)
        with self._wake:
            self._canary_rows = rows
            self._wake.notify_all()

    def snapshot(self) -> Snapshot:
        """The latest snapshot; never computes. Refreshed about 30 times a window, less often where that takes long."""
        return self._snapshot

    @property
    def counters(self) -> Counters:
        """The totals as they are now."""
        with self._wake:
            c = self._counters
            return Counters(dict(c.rows), c.trace_product, c.frobenius_product, dict(c.band_energy), c.seconds)

    def moments(self, window: float | None = None) -> Moments:
        """Exact additive moments of a window's unit-norm rows, by default the longest. KeyError if unknown."""
        seconds = self.windows[-1] if window is None else float(window)
        if seconds not in self.windows:
            raise KeyError(f"window {seconds:g} is not among {self.windows}")
        with self._state:
            blocks = self._intake.ring.within(seconds, self._clock())
            return merge([Moments(self.dimension, self._intake.shift), *(block.moments for block in blocks)])

    def state(self) -> dict[str, Tensor]:
        """The windows as tensors, for safetensors: what `restore` takes after a restart; not the totals."""
        saved = torch.tensor([time.time()], dtype=torch.float64)
        with self._state:
            return self._intake.ring.tensors(self._clock()) | self._identity() | {"saved": saved}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume the windows of a `state`, as much older as the time since; rows observed before this call are
        forgotten.

        ValueError for a damaged state and for one of another dimension or reference: nothing spans two encoders.
        """
        for name, expected in self._identity().items():
            if name not in tensors or not torch.equal(tensors[name], expected):
                raise ValueError(f"state: {name!r} is missing or of another encoder")
        if "saved" not in tensors:
            raise ValueError("state: 'saved' is missing")
        with self._state:
            elapsed = max(0.0, time.time() - float(tensors["saved"]))
            self._intake.ring.load(tensors, self._clock() - elapsed)
            self._intake.forget_open()
        self.flush()

    def _identity(self) -> dict[str, Tensor]:
        energy = torch.zeros(0) if self.reference is None else self.reference.band_energy
        return {"dimension": torch.tensor([self.dimension]), "reference": energy}

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything observed so far is in the snapshot; False if that took over `timeout` seconds."""
        with self._wake:
            self._tickets += 1
            ticket = self._tickets
            self._wake.notify_all()
            return self._wake.wait_for(lambda: self._served >= ticket or not self._thread.is_alive(), timeout)

    def close(self) -> None:
        """Take in what waits, refresh once more and end the thread; later rows count as dropped. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, pinned: threading.Event) -> None:
        # torch's thread count is a thread's own once it has been read; unread, it would be reset to the default.
        torch.get_num_threads()
        torch.set_num_threads(1)
        pinned.set()
        patience = min(1.0, self.windows[0] / (4 * GROUPS))
        closing = False
        while not closing:
            with self._wake:
                self._wake.wait_for(self._has_work, patience)
                batches, ticket, closing = list(self._pending), self._tickets, self._closing
                canary, self._canary_rows = self._canary_rows, None
                self._pending.clear()
                self._pending_rows = 0
                forced = closing or ticket > self._served
            started = time.thread_time()
            try:
                with self._state:
                    self._intake.take(batches, forced)
                if canary is not None:
                    self._refresher.record_canary(canary)
                if forced or canary is not None or self._refresher.due():
                    self._refresh(everything=forced)
            except Exception:
                # Serving must go on; the snapshot's timestamp stops, which has an alert of its own.
                logger.exception("the spectrum monitor failed on a block")
            with self._wake:
                self._counters.seconds += time.thread_time() - started
                self._served = ticket
                self._wake.notify_all()

    def _has_work(self) -> bool:
        waiting = self._pending_rows >= self.block_rows or self._canary_rows is not None
        return self._closing or self._tickets > self._served or waiting

    def _refresh(self, everything: bool) -> None:
        with self._state:
            detector = self._intake.detector
            evidence = Evidence() if detector is None else detector.evidence
            self._snapshot = self._refresher.refresh(self._intake.ring, evidence, self.counters, everything)

    def _count(self, more: Counters) -> None:
        with self._wake:
            self._counters.add(more)


def _copy(tensor: Tensor) -> Tensor:
    """A copy in float32 on the same device: on an accelerator the copy is queued, and nobody waits for it."""
    return tensor.detach().to(torch.float32, copy=True)


def _event(tensor: Tensor) -> torch.cuda.Event | None:
    """Marks when the copies queued for an accelerator's tensor are done, for another thread to wait on."""
    if tensor.device.type != "cuda":
        return None
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event
