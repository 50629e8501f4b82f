"""Bulk embedding: each shard of a source becomes one file of rows, which is written atomically.

A shard's output depends only on the shard and the encoder. So a run that was killed continues with the missing shards,
and the output has every id exactly once. A bad image becomes a row with an error. Each shard's moments are stored
beside its rows; merged, they give the exact spectrum of all rows.
"""

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullrank.descriptors import describe, width
from models.artifact import CARD, load
from models.decode import ImageError
from models.embedder import Embedder, faulty, normalize
from models.files import SCRATCH
from models.preprocess import Pixels, Preprocessing, decode
from scale.output import RUN, BulkError, Dtype, Format, Report, Rows, Run, report
from scale.places import Place, place
from scale.processes import Progress, tied_to_parent
from scale.sources import ADDRESS, Item, Shard, SourceError

__all__ = ["RUN", "BulkError", "Embedding", "Report", "Written", "begin", "report", "run_local"]

BATCH = 32
PART = 1024  # rows that are normalised at once
POLL = 1.0  # seconds between two looks at what the processes have done
NO_DIRECTION = "the encoder gave no finite embedding with a direction for this image"


@dataclass(frozen=True)
class Written:
    """The result of one shard."""

    name: str
    rows: int
    errors: int
    seconds: float


class Embedding:
    """Embeds shards into a folder. One is made in each process, or by Ray in each actor."""

    def __init__(self, encoder: str, out: str, device: str = "cpu", engine: str = "auto", threads: int = 1) -> None:
        """Load the encoder, and read in `out` what `begin` says is to be written. Raises ArtifactError, BulkError."""
        torch.set_num_threads(threads)
        self.artifact = load(Path(encoder))
        self.out = place(out)
        self.run = Run.of(self.out)
        dtype = self.run.torch_dtype
        self.embedder = Embedder(self.artifact, device, dtype, BATCH, engine, threads)  # type: ignore[arg-type]
        self.run.warm_up()
        self._inputs = width(self.artifact.card.preprocessing.channels)

    def __call__(self, shard: Shard, progress: Callable[[int], None] = lambda images: None) -> Written:
        """Embed one shard and write it. Raises SourceError if it cannot be read, OSError if not written.

        `progress` is told of every batch how many images it had.
        """
        started = time.monotonic()
        ids = list[str]()
        errors = list[str | None]()
        rows = [torch.empty(0, self.embedder.dimension)]
        inputs = [np.empty((0, self._inputs), np.float32)]
        for batch in _batches(shard.read(), self.artifact.card.preprocessing):
            ids += batch.ids
            errors += batch.errors
            if batch.pixels:
                pixels = np.stack(batch.pixels)
                rows.append(self.embedder.embed(pixels))
                if self.run.inputs:
                    inputs.append(describe(pixels))
            progress(len(batch.ids))
        if len(set(ids)) < len(ids):
            ((twice, _),) = Counter(ids).most_common(1)
            raise SourceError(f"{shard.paths[0]}: two images have the id {twice!r}; ids have to be unique in a shard")
        decoded = np.array([error is None for error in errors], bool)
        table = _spread(_units(torch.cat(rows)), decoded, np.nan)
        for index in np.flatnonzero(decoded & ~np.isfinite(table).all(1)):
            errors[index] = NO_DIRECTION
        described = _spread(np.concatenate(inputs), decoded, 0.0) if self.run.inputs else None
        self.run.write(self.out, shard.name, Rows(ids, errors, table, described))
        return Written(shard.name, len(ids), sum(it is not None for it in errors), time.monotonic() - started)


@dataclass(frozen=True)
class _Batch:
    """Images in the order of the shard: ids, for each an error or None, and the pixels of those without an error."""

    ids: list[str]
    errors: list[str | None]
    pixels: list[Pixels]


def _batches(items: Iterator[Item], preprocessing: Preprocessing) -> Iterator[_Batch]:
    """Batches that hold the pixels of BATCH images each, the last one fewer."""
    batch = _Batch([], [], [])
    for item in items:
        reason = item.error
        if not reason:
            try:
                batch.pixels.append(decode(item.data, preprocessing))
            except ImageError as error:
                reason = str(error) or error.code
        batch.ids.append(item.id)
        batch.errors.append(reason or None)
        if len(batch.pixels) == BATCH:
            yield batch
            batch = _Batch([], [], [])
    if batch.ids:
        yield batch


def _units(rows: torch.Tensor) -> np.ndarray:
    """Scale rows (n, d) to unit length, in place. A row that is not finite or is all zero becomes NaN."""
    for part in torch.split(rows, PART):  # in float64 a part takes four times the memory of its rows
        unit = normalize(part)
        unit[faulty(part)] = torch.nan
        part.copy_(unit)
    found: np.ndarray = rows.numpy()
    return found


def _spread(rows: np.ndarray, where: np.ndarray, missing: float) -> np.ndarray:
    """Put (m, k) rows where the mask (n,) has its m true values, and `missing` into the other rows: (n, k)."""
    if len(rows) == len(where):
        return rows
    spread = np.full((len(where), rows.shape[1]), missing, rows.dtype)
    spread[where] = rows
    return spread


def begin(
    out: Place,
    encoder: Path,
    shards: Sequence[Shard],
    *,
    file_format: Format = "parquet",
    inputs: bool = False,
    dtype: Dtype = "float32",
) -> list[Shard]:
    """Create the output folder, or continue in it. Returns the shards that are still to do.

    inputs: keep descriptors of the images, which a reference needs. dtype: what the encoder computes in. Raises
    BulkError if the folder lies in the source, holds another encoder's rows, rows in another format, rows computed in
    another dtype or rows of another source, or cannot be written.
    """
    for root in {shard.root for shard in shards if shard.root}:
        if _inside(out, root):
            raise BulkError(
                f"{out} lies in the source {root}: the next run would take rows for images; choose another --out"
            )
    card = load(encoder).card
    mine = Run(card.name, card.revision, file_format, inputs, dtype)
    try:
        if (out / CARD).exists():
            raise BulkError(f"{out} is an encoder's folder: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        if (out / RUN).exists():
            there = Run.of(out)
            if not there.is_of(card):
                raise BulkError(
                    f"{out} holds rows of {there.encoder}@{there.revision}, not of "
                    f"{card.name}@{card.revision}: choose another --out"
                )
            if there.format != mine.format:
                raise BulkError(
                    f"{out} holds rows as {there.format}, not as {mine.format}: give --format {there.format}, or "
                    "choose another --out"
                )
            if there.dtype != mine.dtype:
                raise BulkError(
                    f"{out} holds rows computed in {there.dtype}, not in {mine.dtype}: give --dtype {there.dtype}, or "
                    "choose another --out"
                )
        if strange := set(mine.shards(out)) - {shard.name for shard in shards}:
            raise BulkError(
                f"{out} holds {len(strange)} shards that this source does not have, such as {min(strange)}: were files "
                "added or removed? Images would come twice: choose another --out"
            )
        mine.save(out)
        complete = mine.complete(out)
    except OSError as error:
        raise BulkError(f"{out}: {error.strerror or error}; choose another --out") from error
    return [shard for shard in shards if shard.name not in complete]


def _inside(out: Place, root: str) -> bool:
    if isinstance(out, Path):
        return not ADDRESS.match(root) and out.resolve().is_relative_to(Path(root).resolve())
    return f"{out}/".startswith(root)


def sweep(out: Place) -> None:
    """Delete what processes had begun to write when they were killed. Raises OSError."""
    for left in out.glob(f".*{SCRATCH}"):
        left.unlink(missing_ok=True)


_here: tuple[Embedding, Callable[[int], None]] | None = None


def _start(arguments: tuple[Any, ...], progress: Callable[[int], None]) -> None:
    global _here
    _here = Embedding(*arguments), progress


def _start_process(arguments: tuple[Any, ...], progress: Callable[[int], None]) -> None:
    tied_to_parent()
    _start(arguments, progress)


def _one(shard: Shard) -> Written:
    assert _here is not None
    embedding, progress = _here
    return embedding(shard, progress)


def run_local(
    shards: Sequence[Shard],
    encoder: Path,
    out: Place,
    *,
    processes: int = 1,
    device: str = "cpu",
    engine: str = "auto",
    done: Callable[[Written], None] = lambda written: None,
    failed: Callable[[str], None] = lambda reason: None,
    progress: Callable[[int], None] = lambda images: None,
) -> None:
    """Embed the shards in `processes` processes of one thread each; 1 means this process.

    A shard that cannot be read is reported to `failed` and left out, so that the next run tries it again. `progress` is
    told now and then how many images were done since it was told last. Raises BulkError if output cannot be written,
    because the next shard would fail too, or if a process dies.
    """
    arguments = (str(encoder), str(out), device, engine)
    if processes == 1:
        _start(arguments, progress)
        for shard in shards:
            _settle(lambda shard=shard: _one(shard), done, failed)  # type: ignore[misc]
        return
    context = multiprocessing.get_context("spawn")
    counted = Progress(context)
    with ProcessPoolExecutor(
        min(processes, max(1, len(shards))), context, _start_process, (arguments, counted)
    ) as pool:
        waiting: set[Future[Written]] = set()
        left = deque(shards)
        try:
            while left or waiting:
                while left and len(waiting) < 2 * processes:
                    waiting.add(pool.submit(_one, left.popleft()))
                finished, waiting = wait(waiting, POLL, FIRST_COMPLETED)
                progress(counted.taken())
                for future in finished:
                    _settle(future.result, done, failed)
        except BrokenProcessPool as error:
            raise BulkError(
                "a process ended by itself: killed, perhaps because memory ran out, or unable to load the encoder; run "
                "the same command again to go on, with fewer --processes if memory is short"
            ) from error
        finally:
            counted.stop()
            for future in waiting:
                future.cancel()


def _settle(result: Callable[[], Written], done: Callable[[Written], None], failed: Callable[[str], None]) -> None:
    try:
        written = result()
    except SourceError as error:
        failed(str(error))
    except OSError as error:
        raise BulkError(f"the output cannot be written: {error}; run the same command again to go on") from error
    else:
        done(written)
