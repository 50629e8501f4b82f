"""Blocks of rows: batches are sifted and normalised, and each block is measured against the one before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fullrank import profile
from fullrank.calibration.sequential import Detector
from fullrank.moments import Moments
from fullrank.monitor.snapshot import GROUPS, Counters
from fullrank.monitor.window import Block, RecentKeys, Ring
from fullrank.profile import band_sums
from fullrank.reference import Reference
from fullrank.rows import unit
from fullrank.sample import GROUP_ROWS, alike, thinned
from fullrank.statistics import norm_histogram


@dataclass(frozen=True)
class Batch:
    """Rows (n, d) observed together at `time` (seconds). On an accelerator `ready` says when they may be read."""

    time: float
    rows: Tensor
    keys: list[int] | None
    inputs: Tensor | None
    ready: torch.cuda.Event | None
    zeros: int = 0  # rows of zeros that came with these and were taken out

    def part(self, which: slice) -> "Batch":
        """Some of the rows."""
        keys = None if self.keys is None else self.keys[which]
        inputs = None if self.inputs is None else self.inputs[which]
        return Batch(self.time, self.rows[which], keys, inputs, self.ready)


class BlockMaker:
    """Makes blocks of rows and puts them into a ring. For one thread at a time.

    A block closes at `block_rows` rows, or after a tenth of the shortest window. `count` is called with what each batch
    and each block adds to the totals. `abandoned` says whether to stop after the block at hand. `detector` is None
    without a calibrated reference.
    """

    def __init__(
        self,
        dimension: int,
        reference: Reference | None,
        windows: Sequence[float],
        block_rows: int,
        clock: Callable[[], float],
        count: Callable[[Counters], None],
        abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self._dimension = dimension
        self._reference = reference
        self._block_rows = block_rows
        self._clock = clock
        self._count = count
        self._abandoned = abandoned
        self._longest_wait = windows[0] / GROUPS
        self.ring = Ring(windows, GROUPS)
        self.shift = None if reference is None else reference.mean
        calibrated = reference is not None and reference.calibration is not None
        self.detector = Detector(reference) if reference is not None and calibrated else None
        self._keys = RecentKeys(windows[0])
        self._open: list[Batch] = []
        self._previous: tuple[Tensor, Tensor] | None = None  # the block before, centred, and its mean
        self._basis: Tensor | None = None

    def take(self, batches: Sequence[Batch], everything: bool) -> None:
        """Take rows in; `everything` closes the last block however short."""
        for batch in batches:
            kept = self._sift(batch)
            if kept.zeros:
                self._open.append(replace(kept.part(slice(0, 0)), zeros=kept.zeros))
                if self.open_rows >= self._block_rows:
                    self._close_block()
            while len(kept.rows):
                room = self._block_rows - self.open_rows
                self._open.append(kept.part(slice(0, room)))
                if len(kept.rows) >= room:
                    self._close_block()
                if self._abandoned():
                    return
                kept = kept.part(slice(room, None))
        stale = self._open and self._clock() - self._open[0].time >= self._longest_wait
        if self._open and (everything or stale):
            self._close_block()

    @property
    def open_rows(self) -> int:
        """Rows of the block that is not closed yet, rows of zeros among them."""
        return sum(len(part.rows) + part.zeros for part in self._open)

    @property
    def uncounted(self) -> int:
        """Rows of the block that is not closed yet that no counter has: those of zeros were counted as they came."""
        return sum(len(part.rows) for part in self._open)

    def forget_open(self) -> None:
        """Drop the rows of the block that is not closed yet, and count them."""
        self._count(Counters({"dropped": self.uncounted}))
        self._open = []

    def _sift(self, batch: Batch) -> Batch:
        """The batch without rows that are not finite, rows seen before and rows of zeros; all are counted."""
        if batch.ready is not None:
            batch.ready.synchronize()
        rows = batch.rows.to("cpu", torch.float32)
        squares = rows.double().square().sum(1)
        keep = squares.isfinite()
        if batch.inputs is not None:
            keep &= batch.inputs.to("cpu").isfinite().all(1)
        nonfinite = len(rows) - int(keep.sum())
        duplicates = 0
        if batch.keys is not None:
            finite = keep.tolist()  # one by one, elements of a tensor would hand the GIL over once a row
            fresh = [it and self._keys.enter(key, batch.time) for it, key in zip(finite, batch.keys, strict=True)]
            keep = torch.tensor(fresh, dtype=torch.bool)
            duplicates = sum(finite) - sum(fresh)
        zeros = int((keep & (squares == 0)).sum())
        keep &= squares > 0
        self._count(Counters({"nonfinite": nonfinite, "duplicate": duplicates, "zero": zeros}))
        inputs = None if batch.inputs is None else batch.inputs.to("cpu", torch.float32)[keep]
        return Batch(batch.time, rows[keep], None, inputs, None, zeros)

    def _moments_of_inputs(self, descriptors: Tensor) -> Moments:
        """The moments of descriptors (n, k), as the reference bounds them."""
        if self._reference is not None and self._reference.inputs is not None:
            descriptors = self._reference.inputs.bounded(descriptors)
        return Moments(descriptors.shape[1]).add(descriptors)

    def _close_block(self) -> None:
        parts = self._open
        self._open = []
        raw = torch.cat([part.rows for part in parts])
        rows = unit(raw)
        n = len(rows)
        moments = Moments(self._dimension, self.shift).add(rows)
        if self.shift is None:
            self.shift = moments.shift
        centred = profile.centred(rows)
        energies = torch.zeros(self._dimension, dtype=torch.float64)
        trace = frobenius = 0.0
        within = across = torch.zeros(2, dtype=torch.float64)
        if n > 1:
            mean = moments.mean().to(centred.dtype)
            within = profile.copies(centred)
            if self._reference is not None:
                if self._basis is None:
                    # Not in the constructor, which the caller waits for: 16 ms at d = 2048.
                    self._basis = self._reference.basis.float()
                energies = profile.energies_of_rows(centred, self._basis)
            if self._previous is not None:
                # Short blocks count for less, in both products alike.
                previous, previous_mean = self._previous
                weight = n * len(previous) / self._block_rows**2
                gram = centred @ previous.T
                trace, frobenius = (weight * it for it in profile.block_products(centred, previous, gram))
                across = profile.copies(centred, previous, gram, mean - previous_mean)
            self._previous = (centred, mean)
        described = [part.inputs for part in parts if part.inputs is not None and len(part.inputs)]
        inputs = self._moments_of_inputs(torch.cat(described)) if described else None
        shown = alike([part.inputs for part in parts], [len(part.rows) for part in parts])
        few_shown = None if shown is None else thinned(torch.cat(shown), GROUP_ROWS).clone()
        if self.detector is not None and n > 1:
            self.detector.add(parts[0].time, n, energies, n * moments.mean(), trace, frobenius)
        norms = norm_histogram(torch.linalg.vector_norm(raw.double(), dim=1))
        zeros = sum(part.zeros for part in parts)
        few = thinned(raw, GROUP_ROWS).clone()
        copies = torch.cat((within, across))
        start, end = parts[0].time, parts[-1].time
        self.ring.add(Block(start, end, moments, energies, norms, inputs, zeros, few, copies, few_shown))
        bands = () if self._reference is None else self._reference.bands
        sums = band_sums(energies, bands).tolist() if bands else []
        self._count(Counters({"sampled": n}, trace, frobenius, dict(zip(bands, sums, strict=True))))
