"""SpectrumMonitor: the spectrum of recent embeddings, measured beside the serving path and never in it."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fullrank.diagnosis import Change, diagnose, thresholds
from fullrank.inputs import InputReading
from fullrank.moments import Moments, merge
from fullrank.reference import Reference, band_sums
from fullrank.rows import ArrayLike, check_rows, unit
from fullrank.sequential import Detector, Evidence
from fullrank.snapshot import Counters, Snapshot
from fullrank.statistics import Canary, measure, norm_histogram
from fullrank.window import Block, RecentKeys, Ring

logger = logging.getLogger(__name__)

GROUPS = 10
# A refresh that takes long is made more rarely: at most this share of one core goes into refreshing.
_DUTY = 0.05


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
        self._pending: deque[_Batch] = deque()
        self._pending_rows = self._tickets = self._served = 0
        self._canary_rows: Tensor | None = None
        self._closing = False
        self._input_width: int | None = None
        self._counters = Counters(band_energy=dict.fromkeys(reference.bands, 0.0) if reference else {})
        # Guarded by _state: what the worker accumulates.
        self._state = threading.Lock()
        self._ring = Ring(self.windows, GROUPS)
        self._keys = RecentKeys(self.windows[0])
        self._open: list[_Batch] = []
        self._previous: Tensor | None = None
        self._shift = None if reference is None else reference.mean
        self._basis = None if reference is None else reference.basis.float()
        self._canary: Canary | None = None
        self._canary_time = -math.inf
        calibrated = reference is not None and reference.calibration is not None
        self._detector = Detector(reference) if reference is not None and calibrated else None
        self._next_refresh = -math.inf
        self._due = dict.fromkeys(self.windows, -math.inf)
        self._snapshot: Snapshot
        self._refresh(everything=True)
        pinned = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pinned,), name="spectrum-monitor", daemon=True)
        self._thread.start()
        pinned.wait()
        # The worker's own set_num_threads(1) also became the default of threads yet to start: put that back.
        torch.set_num_threads(torch.get_num_threads())

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
        batch = _Batch(self._clock(), _copy(tensor), hashes, descriptors, _event(tensor))
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
            blocks = self._ring.within(seconds, self._clock())
            return merge([Moments(self.dimension, self._shift), *(block.moments for block in blocks)])

    def state(self) -> dict[str, Tensor]:
        """The windows as tensors, for safetensors: what `restore` takes after a restart; not the totals."""
        saved = torch.tensor([time.time()], dtype=torch.float64)
        with self._state:
            return self._ring.tensors(self._clock()) | self._identity() | {"saved": saved}

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
            self._ring.load(tensors, self._clock() - elapsed)
            self._open = []
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
                self._take_in(batches, forced)
                if canary is not None:
                    self._canary, self._canary_time = self._compare(canary), self._clock()
                if forced or canary is not None or self._clock() >= self._next_refresh:
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

    def _take_in(self, batches: Sequence["_Batch"], forced: bool) -> None:
        with self._state:
            for batch in batches:
                kept = self._sift(batch)
                while len(kept.rows):
                    room = self.block_rows - sum(len(part.rows) for part in self._open)
                    self._open.append(kept.part(slice(0, room)))
                    if len(kept.rows) >= room:
                        self._close_block()
                    kept = kept.part(slice(room, None))
            stale = self._open and self._clock() - self._open[0].time >= self.windows[0] / GROUPS
            if self._open and (forced or stale):
                self._close_block()

    def _sift(self, batch: "_Batch") -> "_Batch":
        """The batch without rows that are not finite and rows seen before; both are counted."""
        if batch.ready is not None:
            batch.ready.synchronize()
        rows = batch.rows.to("cpu", torch.float32)
        keep = rows.double().square().sum(1).isfinite()
        if batch.inputs is not None:
            keep &= batch.inputs.to("cpu").isfinite().all(1)
        nonfinite = len(rows) - int(keep.sum())
        duplicates = 0
        if batch.keys is not None:
            for i, key in enumerate(batch.keys):
                if keep[i] and not self._keys.enter(key, batch.time):
                    keep[i] = False
                    duplicates += 1
        with self._wake:
            self._counters.rows["nonfinite"] += nonfinite
            self._counters.rows["duplicate"] += duplicates
        inputs = None if batch.inputs is None else batch.inputs.to("cpu", torch.float32)[keep]
        return _Batch(batch.time, rows[keep], None, inputs, None)

    def _close_block(self) -> None:
        parts, self._open = self._open, []
        raw = torch.cat([part.rows for part in parts])
        rows = unit(raw)
        n = len(rows)
        moments = Moments(self.dimension, self._shift).add(rows)
        if self._shift is None:
            self._shift = moments.shift
        centred = rows - moments.mean().float()
        energies = torch.zeros(self.dimension, dtype=torch.float64)
        if self._basis is not None and n > 1:
            # Each block about its own mean: about any other, a jump of the mean would fill the tail.
            energies = (centred @ self._basis).double().square().sum(0) * (n / (n - 1))
        trace = frobenius = 0.0
        if n > 1:
            centred = centred / math.sqrt(n - 1)
            if self._previous is not None:
                # <S, S'> = |Y Y'^T|^2 needs no d x d matrix. Short blocks count for less, in both products alike.
                weight = n * len(self._previous) / self.block_rows**2
                frobenius = weight * float((centred @ self._previous.T).double().square().sum())
                trace = weight * float(centred.double().square().sum() * self._previous.double().square().sum())
            self._previous = centred
        described = [part.inputs for part in parts if part.inputs is not None]
        inputs = Moments(described[0].shape[1]).add(torch.cat(described)) if described else None
        if self._detector is not None and n > 1:
            self._detector.add(parts[0].time, n, energies, n * moments.mean(), trace, frobenius)
        norms = norm_histogram(torch.linalg.vector_norm(raw.double(), dim=1))
        self._ring.add(Block(parts[0].time, parts[-1].time, moments, energies, norms, inputs))
        with self._wake:
            self._counters.rows["sampled"] += n
            self._counters.trace_product += trace
            self._counters.frobenius_product += frobenius
            if self.reference is not None:
                for rank, energy in zip(
                    self.reference.bands, band_sums(energies, self.reference.bands).tolist(), strict=True
                ):
                    self._counters.band_energy[rank] += energy

    def _compare(self, rows: Tensor) -> Canary:
        assert self.reference is not None
        assert self.reference.canary is not None
        cosines = (unit(rows).double() * self.reference.canary.double()).sum(1)
        return Canary(float(cosines.min()), Moments(self.dimension).add(unit(rows)).participation_ratio())

    def _refresh(self, everything: bool) -> None:
        started = time.monotonic()
        with self._state:
            now = self._clock()
            self._ring.expire(now)
            held = {seconds: self._ring.within(seconds, now) for seconds in self.windows}
            windows = {}
            for seconds, blocks in held.items():
                # A long window changes slowly, and at d = 2048 its eigenvalues alone take most of a second.
                if everything or now >= self._due[seconds]:
                    windows[seconds] = measure(seconds, blocks, self.reference, self.dimension)
                    self._due[seconds] = now + seconds / 30
                else:
                    windows[seconds] = self._snapshot.windows[seconds]
            described = {seconds: _inputs(blocks) for seconds, blocks in held.items()}
            inputs = {seconds: self._read(moments) for seconds, moments in described.items()}
            evidence = Evidence() if self._detector is None else self._detector.evidence
            change, start = None, now - self.windows[0]
            if evidence.alarm:
                start = evidence.since
                since = [block for block in held[self.windows[-1]] if block.start > start]
                rows = measure(now - start, since, self.reference, self.dimension)
                change = Change(evidence.signal, rows, self._read(_inputs(since)))
        shortest = described[self.windows[0]]
        vouched = self._canary_time >= start
        self._snapshot = Snapshot(
            time.time(),
            self.dimension,
            windows,
            diagnose(windows, self.reference, self._canary, inputs, change, vouched=vouched),
            thresholds(self.reference, max(2, windows[self.windows[0]].rows)),
            self.counters,
            self._canary,
            math.nan if shortest is None else shortest.participation_ratio(),
            self.reference,
            inputs[self.windows[0]],
            evidence,
        )
        took = time.monotonic() - started
        self._next_refresh = self._clock() + max(self.windows[0] / 30, took / _DUTY)

    def _read(self, inputs: Moments | None) -> InputReading:
        known = self.reference is not None and self.reference.inputs is not None
        return self.reference.inputs.read(inputs) if known else InputReading()  # type: ignore[union-attr]


def _inputs(blocks: Sequence[Block]) -> Moments | None:
    described = [block.inputs for block in blocks if block.inputs is not None]
    return merge(described) if described else None


@dataclass(frozen=True)
class _Batch:
    time: float
    rows: Tensor
    keys: list[int] | None
    inputs: Tensor | None
    ready: torch.cuda.Event | None

    def part(self, which: slice) -> "_Batch":
        keys = None if self.keys is None else self.keys[which]
        inputs = None if self.inputs is None else self.inputs[which]
        return _Batch(self.time, self.rows[which], keys, inputs, self.ready)


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
