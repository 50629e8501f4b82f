"""The files of a bulk run: one file of rows for each shard, what belongs to it beside it, and `run.json` for all.

    run.json                  whose rows these are, and their format
    SHARD.parquet             id, embedding, error
    SHARD.npy, SHARD.jsonl    as npy: (n, d) float32, NaN where there is no embedding; {"id", "error"} for each row
    SHARD.moments.safetensors the moments of the shard's rows, packed
    SHARD.inputs.safetensors  descriptors of the images, in runs that build a reference

The file of rows is written last, and renamed into place: if it is there, the shard is complete. In an object store,
where nothing is renamed, an upload is seen whole or not at all.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from fullrank.merging import Merging
from fullrank.moments import Moments
from fullrank.stored import check_plain, tensors_in
from fullrank.wording import words_of
from models.card import EncoderCard
from scale.places import Place, write_all

RUN = "run.json"
MOMENTS = ".moments.safetensors"
INPUTS = ".inputs.safetensors"
Format = Literal["parquet", "npy"]
Dtype = Literal["float32", "bfloat16"]
FORMATS = get_args(Format)
DTYPES = get_args(Dtype)


class BulkError(RuntimeError):
    """Raised for a run that cannot start or go on. The message says why."""


@dataclass(frozen=True)
class Rows:
    """What one shard became: n ids, n errors (None where there is a row), (n, d) float32 rows, NaN where there is none.

    inputs: (n, k) float32, descriptors of the images, zero where there is no row; None in runs that keep none.
    """

    ids: list[str]
    errors: list[str | None]
    table: np.ndarray
    inputs: np.ndarray | None = None

    @property
    def good(self) -> np.ndarray:
        """(n,) bool: which rows are embeddings."""
        return np.array([error is None for error in self.errors], bool)


@dataclass(frozen=True)
class Report:
    """The report on the whole output: numbers of rows and errors, and the spectrum of all rows by merged moments."""

    encoder: str
    revision: str
    dtype: str
    shards: int
    rows: int
    errors: int
    dimension: int
    effective_rank: float
    participation_ratio: float
    total_variance: float


@dataclass(frozen=True)
class Run:
    """What `run.json` says: whose rows these are, how they are written, if with descriptors, and in what precision."""

    encoder: str
    revision: str
    format: Format = "parquet"
    inputs: bool = False
    dtype: Dtype = "float32"  # what the encoder computes in; the rows are float32

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def is_of(self, card: EncoderCard) -> bool:
        """Whether these are rows of this encoder."""
        return self.encoder == card.name and card.is_of(self.revision)

    @classmethod
    def of(cls, out: Place) -> Self:
        """Read it. Raises BulkError if the folder is no output."""
        try:
            said = json.loads((out / RUN).read_text())
            run = cls(**said)
        except (OSError, ValueError, TypeError) as error:
            raise BulkError(f"{out} holds no output of fullrank embed: {error}") from error
        if run.format not in FORMATS:
            raise BulkError(f"{out}: the format {run.format!r} is none of {', '.join(FORMATS)}")
        if run.dtype not in DTYPES:
            raise BulkError(f"{out}: the dtype {run.dtype!r} is none of {', '.join(DTYPES)}")
        return run

    def save(self, out: Place) -> None:
        """Write it. Raises OSError."""
        write_all({out / RUN: json.dumps(asdict(self)) + "\n"})

    def rows_file(self, out: Place, shard: str) -> Place:
        """The file that is there if, and only if, the shard is complete."""
        return out / f"{shard}.{self.format}"

    def complete(self, out: Place) -> set[str]:
        """The shards that need no further work. Raises OSError."""
        found = set(self.shards(out))
        if self.inputs:
            found &= {path.name.removesuffix(INPUTS) for path in out.glob(f"*{INPUTS}")}
        return found

    def shards(self, out: Place) -> list[str]:
        """The names of the complete shards, in order."""
        return sorted(path.name.removesuffix(f".{self.format}") for path in out.glob(f"*.{self.format}"))

    def write(self, out: Place, shard: str, rows: Rows) -> None:
        """Write a shard's files, each atomically, the rows last; all or none of them. Raises OSError."""
        contents = self._contents(out, shard, rows)
        try:
            write_all(contents)
        except OSError:
            if not self.rows_file(out, shard).exists():
                for path in contents:
                    path.unlink(missing_ok=True)
            raise

    def warm_up(self) -> None:
        """Import what writing needs, and write nothing, so that the first shard does not pay for it."""
        one = np.ones((1, 1), np.float32)
        self._contents(Path(), "", Rows([""], [None], one, one if self.inputs else None))

    def _contents(self, out: Place, shard: str, rows: Rows) -> dict[Place, bytes | memoryview]:
        """The files of a shard, the rows last."""
        moments = Moments(rows.table.shape[1])
        if (good := rows.good).any():
            moments.add(rows.table if good.all() else rows.table[good])
        contents: dict[Place, bytes | memoryview] = {_moments_file(out, shard): to_bytes(moments.tensors(packed=True))}
        if rows.inputs is not None:
            contents[_inputs_file(out, shard)] = to_bytes({"inputs": torch.from_numpy(rows.inputs)})
        if self.format == "npy":
            lines = [{"id": id_, "error": error} for id_, error in zip(rows.ids, rows.errors, strict=True)]
            contents[out / f"{shard}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        contents[self.rows_file(out, shard)] = _npy(rows.table) if self.format == "npy" else self._parquet(rows)
        return contents

    def _parquet(self, rows: Rows) -> memoryview:
        import pyarrow as pa
        import pyarrow.parquet as pq

        n, d = rows.table.shape
        # From buffers: `mask=` would load pyarrow.compute, which takes as long as a hundred images.
        values = pa.Array.from_buffers(pa.float32(), n * d, [None, pa.py_buffer(np.ascontiguousarray(rows.table))])
        there = pa.py_buffer(np.packbits(rows.good, bitorder="little"))
        embeddings = pa.Array.from_buffers(pa.list_(pa.float32(), d), n, [there], children=[values])
        schema = pa.schema(
            [("id", pa.string()), ("embedding", pa.list_(pa.float32(), d)), ("error", pa.string())],
            metadata={"encoder": self.encoder, "revision": self.revision, "dtype": self.dtype},
        )
        columns = [pa.array(rows.ids, pa.string()), embeddings, pa.array(rows.errors, pa.string())]
        sink = pa.BufferOutputStream()
        # Embeddings neither repeat nor compress: to try costs time and gains nothing.
        compression = {"id": "zstd", "error": "zstd", "embedding.list.element": "none"}
        table = pa.Table.from_arrays(columns, schema=schema)
        pq.write_table(table, sink, compression=compression, use_dictionary=["error"], write_statistics=["id"])
        return memoryview(sink.getvalue())

    def read_errors(self, out: Place, shard: str) -> list[str | None]:
        """For each row of a shard its error, or None."""
        if self.format == "npy":
            return [json.loads(line)["error"] for line in (out / f"{shard}.jsonl").read_text().splitlines()]
        import pyarrow.parquet as pq

        errors: list[str | None] = pq.read_table(_opened(self.rows_file(out, shard)), columns=["error"])[
            "error"
        ].to_pylist()
        return errors

    def read_rows(self, out: Place, shard: str) -> np.ndarray:
        """(m, d) float32: the embeddings of a shard, without the rows that have none."""
        if self.format == "npy":
            table: np.ndarray = _table(self.rows_file(out, shard))
            return np.asarray(table[np.isfinite(table[:, 0])])
        import pyarrow.parquet as pq

        column = pq.read_table(_opened(self.rows_file(out, shard)), columns=["embedding"])["embedding"].combine_chunks()
        width = column.type.list_size
        return np.asarray(column.drop_null().flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def merged(run: Run, out: Place) -> Moments:
    """The moments of all rows of an output. Raises BulkError if it has none, or a shard is damaged."""
    merging: Merging | None = None
    for shard in run.shards(out):
        with _reading(run, out, shard, file := _moments_file(out, shard)):
            state = _tensors(file)
            merging = merging or Merging(state["sum"].numel())
            merging.add(state)
    if merging is None:
        raise BulkError(f"{out} holds no complete shard yet")
    return merging.total()


def report(out: Place) -> Report:
    """The report on a folder of output. Raises BulkError if it holds none, or a shard is damaged."""
    run = Run.of(out)
    whole = merged(run, out)
    errors = []
    for shard in run.shards(out):
        with _reading(run, out, shard):
            errors.append(run.read_errors(out, shard))
    few = whole.count < 2
    return Report(
        encoder=run.encoder,
        revision=run.revision,
        dtype=run.dtype,
        shards=len(errors),
        rows=sum(map(len, errors)),
        errors=sum(error is not None for part in errors for error in part),
        dimension=whole.dimension,
        effective_rank=float("nan") if few else whole.effective_rank(),
        participation_ratio=float("nan") if few else whole.participation_ratio(),
        total_variance=float("nan") if few else float(whole.covariance().trace()),
    )


def sampled(run: Run, out: Place, wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of an output by their numbers, (m, d), and the descriptors of their images, (m, k).

    wanted: numbers of rows with an embedding, counted through the shards in order; the rows come in that order.
    """
    numbers = np.asarray(wanted)
    order = np.argsort(numbers, kind="stable")
    rows = inputs = torch.empty(0)
    start = at = 0
    for shard in run.shards(out):
        with _reading(run, out, shard, file := _moments_file(out, shard)):
            end = start + int(_tensors(file)["scalars"][0])
        upto = int(np.searchsorted(numbers[order], end))
        if upto > at:
            places = order[at:upto]
            taken = numbers[places] - start
            with _reading(run, out, shard):
                found = torch.from_numpy(run.read_rows(out, shard)[taken])
                good = torch.tensor([error is None for error in run.read_errors(out, shard)])
            with _reading(run, out, shard, file := _inputs_file(out, shard)):
                described = _tensors(file)["inputs"][good][taken]
            if not len(rows):
                rows = torch.empty(len(numbers), found.shape[1])
                inputs = torch.empty(len(numbers), described.shape[1])
            rows[places] = found
            # Shards that an earlier version wrote end with the thumbnail.
            inputs = inputs[:, : described.shape[1]]
            inputs[places] = described[:, : inputs.shape[1]]
        start, at = end, upto
    if at < len(numbers):
        raise BulkError(f"{out} holds {start} rows, not those that were asked for")
    return rows, inputs


@contextmanager
def _reading(run: Run, out: Place, shard: str, file: Place | None = None) -> Iterator[None]:
    """Raise BulkError, with the remedy, for what a shard's damaged file raises. file: None for that of its rows."""
    try:
        yield
    except Exception as error:  # safetensors, pyarrow and stores raise kinds of their own
        rows = run.rows_file(out, shard)
        file = file or rows
        reason = words_of(error).removeprefix(f"{file}: ")
        raise BulkError(f"{file}: {reason}; if that lasts, remove {rows.name} and run again") from error


def _moments_file(out: Place, shard: str) -> Place:
    return out / f"{shard}{MOMENTS}"


def _inputs_file(out: Place, shard: str) -> Place:
    return out / f"{shard}{INPUTS}"


def _tensors(file: Place) -> dict[str, Tensor]:
    # A file of this machine is mapped: of moments often only the count is wanted.
    tensors = load_file(file) if isinstance(file, Path) else tensors_in(file.read_bytes())
    check_plain(tensors, "tensor")
    return tensors


def _opened(file: Place) -> Path | io.BytesIO:
    return file if isinstance(file, Path) else io.BytesIO(file.read_bytes())


def _table(file: Place) -> np.ndarray:
    if isinstance(file, Path):
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)  # type: ignore[no-any-return]


def _npy(table: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getbuffer()
