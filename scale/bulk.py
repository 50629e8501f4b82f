"""Bulk embedding: each shard of a source becomes one Parquet file, which is written atomically.

A shard's output depends only on the shard and the encoder. So a run that was killed continues with the missing shards,
and the output has every id exactly once. A bad image becomes a row with an error. Each shard's moments are stored
beside its rows; merged, they give the exact spectrum of all rows.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from fullrank.moments import Moments, merge
from models.artifact import load
from models.decode import ImageError
from models.embedder import Embedder, faulty, normalize
from models.files import SCRATCH, write
from models.preprocess import Pixels, decode
from scale.sources import Item, Shard, SourceError

BATCH = 32
RUN = "run.json"


class BulkError(RuntimeError):
    """Raised for a run that cannot start or go on. The message says why."""


@dataclass(frozen=True)
class Written:
    """The result of one shard."""

    name: str
    rows: int
    errors: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """The report on the whole output: numbers of rows and errors, and the spectrum of all rows by merged moments."""

    encoder: str
    revision: str
    shards: int
    rows: int
    errors: int
    dimension: int
    effective_rank: float
    participation_ratio: float
    total_variance: float


class Embedding:
    """Embeds shards into a folder. One is made in each process, or by Ray in each actor."""

    def __init__(self, encoder: str, out: str, device: str = "cpu", engine: str = "auto", threads: int = 1) -> None:
        """Load the encoder. Raises ArtifactError."""
        torch.set_num_threads(threads)
        self.artifact = load(Path(encoder))
        self.embedder = Embedder(self.artifact, device, max_batch=BATCH, engine=engine, threads=threads)  # type: ignore[arg-type]
        self.out = Path(out)

    def __call__(self, shard: Shard) -> Written:
        """Embed one shard and write it. Raises SourceError if it cannot be read, OSError if not written."""
        started = time.monotonic()
        ids = list[str]()
        errors = list[str | None]()
        rows = list[np.ndarray]()
        moments = Moments(self.embedder.dimension)
        for batch in _batches(shard.read(), self.artifact.card.preprocessing):
            pixels = [prepared for _, prepared, _ in batch if prepared is not None]
            embedded = iter(self._embed(np.stack(pixels)) if pixels else ())
            for item, prepared, reason in batch:
                row = np.full(self.embedder.dimension, np.nan, np.float32) if prepared is None else next(embedded)
                if prepared is not None and not np.isfinite(row).all():
                    reason = "the encoder gave no finite embedding with a direction for this image"
                ids.append(item.id)
                errors.append(reason or None)
                rows.append(row)
        good = np.array([error is None for error in errors], bool)
        table = np.stack(rows) if rows else np.empty((0, self.embedder.dimension), np.float32)
        if good.any():
            moments.add(table[good])
        self._write(shard.name, ids, table, errors, moments)
        return Written(shard.name, len(ids), int((~good).sum()), time.monotonic() - started)

    def _embed(self, pixels: Pixels) -> np.ndarray:
        """(n, d) unit rows; NaN for a row that is not finite or is all zero."""
        rows = self.embedder.embed(pixels)
        unit = normalize(rows)
        unit[faulty(rows)] = torch.nan
        found: np.ndarray = unit.numpy()
        return found

    def _write(self, name: str, ids: list[str], rows: np.ndarray, errors: list[str | None], moments: Moments) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        d = self.embedder.dimension
        bad = pa.array([error is not None for error in errors], pa.bool_())
        values = pa.array(rows.reshape(-1), pa.float32())
        embeddings = pa.FixedSizeListArray.from_arrays(values, d, mask=bad)
        card = self.artifact.card
        schema = pa.schema(
            [("id", pa.string()), ("embedding", pa.list_(pa.float32(), d)), ("error", pa.string())],
            metadata={"encoder": card.name, "revision": card.revision},
        )
        table = pa.table([pa.array(ids, pa.string()), embeddings, pa.array(errors, pa.string())], schema=schema)
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        # The Parquet file is written last: if it is there, the shard is complete.
        write(self.out / f"{name}.moments.safetensors", to_bytes(moments.tensors()))
        write(self.out / f"{name}.parquet", memoryview(content.getvalue()))


def _batches(items: Iterator[Item], preprocessing: Any) -> Iterator[list[tuple[Item, Pixels | None, str]]]:
    """Batches of items with their pixels, or with the reason why they have none. BATCH items of each have pixels."""
    batch = list[tuple[Item, Pixels | None, str]]()
    count = 0
    for item in items:
        if item.error:
            batch.append((item, None, item.error))
            continue
        try:
            batch.append((item, decode(item.data, preprocessing), ""))
            count += 1
        except ImageError as error:
            batch.append((item, None, str(error)))
        if count == BATCH:
            yield batch
            batch = []
            count = 0
    if batch:
        yield batch


def begin(out: Path, encoder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Create the output folder, or continue in it. Returns the shards that are still to do.

    Raises BulkError if the folder holds another encoder's rows or cannot be written.
    """
    card = load(encoder).card
    mine = {"encoder": card.name, "revision": card.revision}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f".*{SCRATCH}"):
            left.unlink(missing_ok=True)
        if (out / RUN).exists():
            there = json.loads((out / RUN).read_text())
            if there != mine:
                raise BulkError(
                    f"{out} holds rows of {there.get('encoder')}@{there.get('revision')}, not of "
                    f"{card.name}@{card.revision}: choose another --out"
                )
        write(out / RUN, json.dumps(mine) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise BulkError(f"{out}: {error}") from error
    return [shard for shard in shards if not (out / f"{shard.name}.parquet").exists()]


_here: Embedding | None = None


def _start(*arguments: Any) -> None:
    global _here
    _here = Embedding(*arguments)


def _one(shard: Shard) -> Written:
    assert _here is not None
    return _here(shard)


def run_local(
    shards: Sequence[Shard],
    encoder: Path,
    out: Path,
    *,
    processes: int = 1,
    device: str = "cpu",
    engine: str = "auto",
    done: Callable[[Written], None] = lambda written: None,
    failed: Callable[[str], None] = lambda reason: None,
) -> None:
    """Embed the shards in `processes` processes of one thread each; 1 means this process.

    A shard that cannot be read is reported to `failed` and left out, so that the next run tries it again. Raises
    BulkError if output cannot be written, because the next shard would fail too.
    """
    arguments = (str(encoder), str(out), device, engine)
    if processes == 1:
        _start(*arguments)
        for shard in shards:
            _settle(lambda shard=shard: _one(shard), done, failed)  # type: ignore[misc]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, arguments) as pool:
        waiting: set[Future[Written]] = set()
        for shard in shards:
            waiting.add(pool.submit(_one, shard))
            while len(waiting) >= 2 * processes:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    _settle(future.result, done, failed)
        for future in waiting:
            _settle(future.result, done, failed)


def _settle(result: Callable[[], Written], done: Callable[[Written], None], failed: Callable[[str], None]) -> None:
    try:
        written = result()
    except SourceError as error:
        failed(str(error))
    except OSError as error:
        raise BulkError(f"the output cannot be written: {error}; run the same command again to go on") from error
    else:
        done(written)


def report(out: Path) -> Report:
    """The report on a folder of output. Raises BulkError if it holds none."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    run = json.loads((out / RUN).read_text()) if (out / RUN).exists() else None
    files = sorted(out.glob("*.parquet"))
    if run is None or not files:
        raise BulkError(f"{out} holds no output of fullrank embed")
    parts = list[Moments]()
    rows = 0
    errors = 0
    for file in files:
        column = pq.read_table(file, columns=["error"])["error"]
        rows += len(column)
        errors += len(column) - pc.sum(pc.is_null(column)).as_py() if len(column) else 0
        parts.append(Moments.from_tensors(load_file(file.with_name(f"{file.stem}.moments.safetensors"))))
    whole = merge(parts)
    few = whole.count < 2
    return Report(
        encoder=run["encoder"],
        revision=run["revision"],
        shards=len(files),
        rows=rows,
        errors=errors,
        dimension=len(whole.mean()),
        effective_rank=float("nan") if few else whole.effective_rank(),
        participation_ratio=float("nan") if few else whole.participation_ratio(),
        total_variance=float("nan") if few else float(whole.covariance().trace()),
    )
