"""SpectrumMonitor: the spectrum of recent embeddings, measured beside the serving path and never in it."""

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fullrank.descriptors import alike
from fullrank.moments import Moments, merge
from fullrank.monitor.blocks import Batch
from fullrank.monitor.snapshot import Counters, Snapshot
from fullrank.monitor.window import Block
from fullrank.monitor.worker import Worker
from fullrank.reference import Reference
from fullrank.rows import ArrayLike, as_tensor, check_rows


class SpectrumMonitor:
    """Watches the embeddings that pass: `observe` copies rows into a bounded buffer, and one thread does the rest.

    dimension: width d of the rows; reference: a `Reference` of the same width, without which there are statistics and
    no verdict; windows: seconds, several at once; block_rows: rows to a block; buffer_rows: rows that may wait,
    beyond which they are dropped and counted; clock: seconds, for tests. The thread uses one core for its arithmetic
    and leaves the caller's torch threads as they are. Thread-safe.

    `close` it, or use it in a `with`, to have the last rows in the snapshot. Where nobody does, the thread ends with
    the monitor or with the process, whichever comes first. A child made by `fork` begins with an empty monitor.

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
        self.dimension = dimension
        self.reference = reference
        self.block_rows = block_rows
        self.buffer_rows = buffer_rows
        self.windows = tuple(sorted(float(seconds) for seconds in set(windows)))
        self._clock = clock
        self.input_width: int | None = None  # of the first inputs, to which all later ones are held
        self._resumed = False  # whether that is the width of a state's inputs alone, which another version described
        self._worker = Worker(dimension, reference, self.windows, block_rows, buffer_rows, clock)
        weakref.finalize(self, self._worker.abandon).atexit = False  # at exit another handler ends all threads

    def observe(
        self, rows: ArrayLike, keys: Sequence[bytes] | np.ndarray | None = None, inputs: ArrayLike | None = None
    ) -> None:
        """Hand over (n, d) embeddings, normalised or not; returns at once and never blocks on the statistics.

        keys: n content hashes, bytes or integers: rows with a key seen within the shortest window count as duplicates.
        inputs: (n, k) small descriptors of what was embedded, for the diversity of the traffic itself. ValueError names
        the argument that has the wrong shape, type or length.
        """
        tensor = as_tensor(rows, "rows")
        check_rows(tensor, self.dimension, "rows")
        n = len(tensor)
        if keys is not None and len(keys) != n:
            raise ValueError(f"keys: expected {n}, one a row, got {len(keys)}")
        hashes = (
            None if keys is None else [hash(key) for key in (keys.tolist() if isinstance(keys, np.ndarray) else keys)]
        )
        descriptors = None
        if inputs is not None:
            descriptors = as_tensor(inputs, "inputs")
            check_rows(descriptors, None, "inputs")
            if not (self._resumed and alike(descriptors.shape[1], self.input_width)):
                check_rows(descriptors, self.input_width, "inputs")
            if len(descriptors) != n:
                raise ValueError(f"inputs: expected {n} rows, got {len(descriptors)}")
            descriptors = _copy(descriptors)
            self.input_width = descriptors.shape[1]
            self._resumed = False
        self._worker.put(Batch(self._clock(), _copy(tensor), hashes, descriptors, _event(tensor)))

    def count_duplicates(self, rows: int) -> None:
        """Count rows that the caller left out because it had handed over the same content before."""
        self._worker.count_duplicates(rows)

    def count_unsampled(self, rows: int) -> None:
        """Count rows that the caller left out at random, so that the monitor sees no more than it should."""
        self._worker.count_unsampled(rows)

    def record_canary(self, embeddings: ArrayLike) -> None:
        """Hand over what the reference's canary images embed to now, (m, d). ValueError for another shape."""
        if self.reference is None or self.reference.canary is None:
            raise ValueError("canary: the reference has none")
        rows = as_tensor(embeddings, "canary")
        check_rows(rows, self.dimension, "canary")
        if len(rows) != len(self.reference.canary):
            raise ValueError(f"canary: expected {len(self.reference.canary)} rows, got {len(rows)}")
        self._worker.put_canary(rows.detach().to("cpu", torch.float32, copy=True))

    def snapshot(self, wait: float = 0.0) -> Snapshot:
        """The latest snapshot, and what it waits for; computes nothing. Refreshed 30 times in the shortest window,
        less often where that takes long.

        wait: seconds to wait, at most, until all rows observed before this call are in it.
        """
        if wait > 0:
            self._worker.flush(wait)
        latest = self._worker.snapshot
        waiting = self._worker.waiting(latest)
        return latest if waiting == latest.waiting else replace(latest, waiting=waiting)

    @property
    def counters(self) -> Counters:
        """The totals as they are now."""
        return self._worker.counters

    def moments(self, window: float | None = None) -> Moments:
        """Exact additive moments of a window's unit-norm rows, by default the longest. KeyError if unknown."""
        seconds = self.windows[-1] if window is None else float(window)
        if seconds not in self.windows:
            raise KeyError(f"window {seconds:g} is not among {self.windows}")
        with self._worker.state:
            blocks = self._worker.blocks.ring.within(seconds, self._clock())
            return merge([Moments(self.dimension, self._worker.blocks.shift), *(block.moments for block in blocks)])

    def blocks(self, groups: int) -> list[Block]:
        """Copies of the windows' rows as at most `groups` blocks (1 or more) of each window's own stretch.

        Their times are ages in seconds. Those no older than a window make up that window; `fullrank.statistics.measure`
        takes those of several monitors together.
        """
        with self._worker.state:
            return self._worker.blocks.ring.joined(groups, self._clock())

    def state(self) -> dict[str, Tensor]:
        """The windows as tensors, for safetensors: what `restore` takes after a restart; not the totals."""
        saved = torch.tensor([time.time()], dtype=torch.float64)
        with self._worker.state:
            return self._worker.blocks.ring.tensors(self._clock()) | self._identity() | {"saved": saved}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume the windows of a `state`, as much older as the time since; rows observed before this call are
        forgotten, those of a block that is not closed yet counted as dropped. So are the state's inputs of images once
        some come with textures, or without, as theirs were not.

        ValueError for a damaged state and for one of another dimension or reference: nothing spans two encoders.
        """
        for name, expected in self._identity().items():
            if name not in tensors or not torch.equal(tensors[name], expected):
                raise ValueError(f"state: {name!r} is missing or of another encoder")
        if "saved" not in tensors:
            raise ValueError("state: 'saved' is missing")
        with self._worker.state:
            elapsed = max(0.0, time.time() - float(tensors["saved"]))
            self._worker.blocks.ring.load(tensors, self._clock() - elapsed)
            self._worker.blocks.forget_open()
            described = [block.inputs.dimension for block in self._worker.blocks.ring.blocks if block.inputs]
        self.input_width = described[-1] if described else None
        self._resumed = bool(described)
        self.flush()

    def _identity(self) -> dict[str, Tensor]:
        energy = torch.zeros(0) if self.reference is None else self.reference.band_energy
        return {"dimension": torch.tensor([self.dimension]), "reference": energy}

    @property
    def running(self) -> bool:
        """Whether its thread runs: until close(), or if it should ever fail."""
        return self._worker.running()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything observed so far is in the snapshot; False if that took over `timeout` seconds."""
        return self._worker.flush(timeout)

    def close(self) -> None:
        """Take in what waits, refresh once more and end the thread; later rows count as dropped. Idempotent."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
