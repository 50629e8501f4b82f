"""The monitor's thread: it takes rows from a bounded buffer, makes blocks of them and refreshes the snapshot.

A thread must end before the interpreter does: one that waits for the interpreter's lock inside torch when the
interpreter goes away ends the process with SIGABRT. So one handler, run at exit, ends all threads, and a child made by
`fork` begins with none. docs/decisions/monitor-threads.md says why it is done this way.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fullrank.calibration.sequential import Evidence
from fullrank.monitor.blocks import Batch, BlockMaker
from fullrank.monitor.snapshot import GROUPS, Counters, Snapshot, SnapshotMaker
from fullrank.reference import Reference

logger = logging.getLogger(__name__)

# A thread that is stuck, on a device that no longer answers, may hold up the end of the process this long (seconds).
_LAST_WAIT = 10.0


class Worker:
    """What one monitor's thread works on. It holds no reference to the monitor, which may be collected meanwhile.

    Thread-safe: `wake` guards what callers hand over and what they read, `state` what the thread accumulates.
    """

    def __init__(
        self,
        dimension: int,
        reference: Reference | None,
        windows: Sequence[float],
        block_rows: int,
        buffer_rows: int,
        clock: Callable[[], float],
    ) -> None:
        self.dimension = dimension
        self.reference = reference
        self.windows = tuple(windows)
        self.block_rows = block_rows
        self.buffer_rows = buffer_rows
        self.clock = clock
        self._closing = False
        self._abandoned = False
        self._begin()
        self.refresh(everything=True)
        self._first = self.snapshot
        self._start()
        _workers.add(self)

    def _begin(self) -> None:
        """Empty buffers, new locks and no thread: at the start, and again in a forked child."""
        self.wake = threading.Condition()
        self.state = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pending: deque[Batch] = deque()
        self._pending_rows = 0
        self._taken = 0  # rows that found room
        self._tickets = 0
        self._served = 0
        self._canary_rows: Tensor | None = None
        bands = () if self.reference is None else self.reference.bands
        self._counters = Counters(band_energy=dict.fromkeys(bands, 0.0))
        self.blocks = BlockMaker(
            self.dimension, self.reference, self.windows, self.block_rows, self.clock, self._count, self.abandoned
        )
        self.snapshots = SnapshotMaker(self.dimension, self.reference, self.windows, self.clock)
        self.snapshot: Snapshot

    def forked(self) -> None:
        """In the child: the parent's rows are the parent's to count. The thread starts with the first row."""
        self._begin()
        self.snapshot = self._first

    def abandoned(self) -> bool:
        """Whether nobody will read any more what the thread has yet to do."""
        return self._abandoned

    def waiting(self, snapshot: Snapshot) -> int:
        """Rows that were taken from callers and are not in the snapshot."""
        return max(0, self._taken - snapshot.counters.seen)

    @property
    def counters(self) -> Counters:
        """The totals as they are now."""
        with self.wake:
            totals = self._counters
            return replace(totals, rows=dict(totals.rows), band_energy=dict(totals.band_energy))

    def put(self, batch: Batch) -> None:
        """Hand over rows; those beyond the buffer's room are dropped and counted. Never waits for the statistics."""
        self._start()
        n = len(batch.rows)
        with self.wake:
            room = 0 if self._closing else max(0, self.buffer_rows - self._pending_rows)
            self._counters.rows["dropped"] += max(0, n - room)
            if min(n, room):
                self._pending.append(batch if n <= room else batch.part(slice(0, room)))
                self._pending_rows += min(n, room)
                self._taken += min(n, room)
            if self._pending_rows >= self.block_rows:
                self.wake.notify_all()

    def count_duplicates(self, rows: int) -> None:
        """Count rows that never needed to come."""
        with self.wake:
            self._taken += rows
            self._counters.rows["duplicate"] += rows

    def count_unsampled(self, rows: int) -> None:
        """Count rows that were left out at random."""
        with self.wake:
            self._counters.unsampled += rows

    def put_canary(self, rows: Tensor) -> None:
        """Hand over what the canary images embed to now."""
        self._start()
        with self.wake:
            self._canary_rows = rows
            self.wake.notify_all()

    def flush(self, timeout: float | None) -> bool:
        """Wait until everything handed over so far is in the snapshot; False if that took over `timeout` seconds."""
        self._start()
        with self.wake:
            self._tickets += 1
            ticket = self._tickets
            self.wake.notify_all()
            return self.wake.wait_for(lambda: self._served >= ticket or not self.running(), timeout)

    def close(self) -> None:
        """Take in what waits, refresh once more and end the thread. Idempotent."""
        with self.wake:
            self._closing = True
            self.wake.notify_all()
        self.join(None)

    def abandon(self) -> None:
        """Have the thread end after the block it is at. Takes no lock, so that the garbage collector may call it."""
        self._abandoned = True
        self._closing = True

    def join(self, timeout: float | None) -> None:
        """Wait for the thread's end, at most so many seconds."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def refresh(self, everything: bool) -> None:
        """Make the next snapshot."""
        with self.state:
            detector = self.blocks.detector
            evidence = Evidence() if detector is None else detector.evidence
            self.snapshot = self.snapshots.refresh(self.blocks.ring, evidence, self.counters, everything)

    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _start(self) -> None:
        """Start the thread where there is none: in a new monitor, and in a child that uses its parent's."""
        if self._thread is not None or self._closing:
            return
        with self._starting:
            if self._thread is not None:
                return
            threads = torch.get_num_threads()
            pinned = threading.Event()
            # A daemon, which the interpreter does not wait for: it would wait for ever. The handler at exit does.
            thread = threading.Thread(target=self._run, args=(pinned,), name="spectrum-monitor", daemon=True)
            thread.start()
            pinned.wait()
            self._thread = thread
            # The worker's own set_num_threads(1) also became the default of threads yet to start: put that back.
            torch.set_num_threads(threads)

    def _run(self, pinned: threading.Event) -> None:
        # torch's thread count is a thread's own once it has been read; unread, it would be reset to the default.
        torch.get_num_threads()
        torch.set_num_threads(1)
        pinned.set()
        patience = min(1.0, self.windows[0] / (4 * GROUPS))
        closing = False
        while not closing and not self._abandoned:
            with self.wake:
                self.wake.wait_for(self._has_work, patience)
                batches = list(self._pending)
                ticket = self._tickets
                closing = self._closing
                canary = self._canary_rows
                self._canary_rows = None
                self._pending.clear()
                self._pending_rows = 0
                forced = closing or ticket > self._served
            if self._abandoned:
                return
            started = time.thread_time()
            try:
                self._work(batches, canary, forced)
            except Exception:
                # Serving must go on; the snapshot's timestamp stops, which has an alert of its own.
                logger.exception("the spectrum monitor failed on a block")
                self._write_off()
            with self.wake:
                self._counters.seconds += time.thread_time() - started
                self._served = ticket
                self.wake.notify_all()

    def _work(self, batches: Sequence[Batch], canary: Tensor | None, forced: bool) -> None:
        with self.state:
            self.blocks.take(batches, forced)
        if canary is not None:
            self.snapshots.record_canary(canary)
        if not self._abandoned and (forced or canary is not None or self.snapshots.due()):
            self.refresh(everything=forced)

    def _write_off(self) -> None:
        """Count the rows that a failure lost as dropped."""
        with self.wake:
            lost = self._taken - self._counters.seen - self.blocks.uncounted - self._pending_rows
            self._count(Counters({"dropped": max(0, lost)}))

    def _has_work(self) -> bool:
        waiting = self._pending_rows >= self.block_rows or self._canary_rows is not None
        return self._closing or self._tickets > self._served or waiting

    def _count(self, more: Counters) -> None:
        with self.wake:
            self._counters.add(more)
            self._taken -= more.rows.get("dropped", 0)  # nothing waits for them any more


def _end(workers: "weakref.WeakSet[Worker]") -> None:
    """Tell all threads first, then wait for them: fifty take no longer than one."""
    running = list(workers)
    for worker in running:
        worker.abandon()
        with worker.wake:
            worker.wake.notify_all()
    deadline = time.monotonic() + _LAST_WAIT
    for worker in running:
        worker.join(max(0.0, deadline - time.monotonic()))


def _forked(workers: "weakref.WeakSet[Worker]") -> None:
    for worker in list(workers):
        worker.forked()


# A set and its handlers belong together, so that a second import of this module takes nothing away from the first.
_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
atexit.register(_end, _workers)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=partial(_forked, _workers))
