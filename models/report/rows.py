"""Reads rows from .npy and Parquet files in chunks, so that a file may be larger than memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096
COLUMN = "embedding"
FLOATS = (np.float16, np.float32, np.float64)


class RowsError(ValueError):
    """Raised for a file that holds no rows. The message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows (n, d) float32, and their names where the file has any. A row that is missing is NaN."""

    rows: Tensor
    ids: list[str] | None


class Rows(Protocol):
    """Rows on disk: how many there are, how wide they are, and the chunks in their order.

    made_by: name and revision of each encoder that the files themselves say they are of; empty where they say nothing.
    """

    path: Path
    count: int
    dimension: int
    made_by: frozenset[tuple[str, str]]

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]: ...


def open_rows(path: Path, column: str | None = None) -> Rows:
    """Open a .npy file, a Parquet file, or a folder of Parquet files. `column` names the one with the rows.

    Raises RowsError if it holds no (n, d) floats, and OSError if it cannot be read.
    """
    if path.is_dir():
        return ParquetRows(path, sorted(it for it in path.glob("*.parquet") if it.is_file()), column)
    if path.suffix == ".parquet":
        return ParquetRows(path, [path], column)
    if column is not None:
        raise RowsError(f"--column: {path} is a .npy file, which has no columns")
    return NpyRows(path)


class NpyRows:
    """Rows of a .npy file. FILE.txt beside it, one name a line, names them, as `fullrank embed --out` writes it."""

    made_by = frozenset[tuple[str, str]]()

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, self._dtype = read(file)
            except Exception as error:  # numpy parses the header with Python's own parser, which may raise anything
                raise RowsError(f"{path}: not a .npy file ({error}); write it with numpy.save") from error
            self._offset = file.tell()
        if len(shape) != 2:
            raise RowsError(f"{path}: expected an array of shape (n, d), found shape {shape}")
        if self._dtype.type not in FLOATS:
            raise RowsError(f"{path}: expected float16, float32 or float64, found {self._dtype}; convert with .astype")
        if fortran:
            raise RowsError(f"{path}: its rows are not contiguous; save numpy.ascontiguousarray(rows)")
        self.count, self.dimension = shape
        _check_size(path, self.count, self.dimension)
        missing = self._offset + self.count * self.dimension * self._dtype.itemsize - path.stat().st_size
        if missing > 0:
            raise RowsError(f"{path}: {missing} bytes are missing from its end: it was cut off")
        names = path.with_suffix(".txt")
        # Not splitlines: names may hold what else ends a line.
        lines = names.read_text(errors="replace").removesuffix("\n").split("\n") if names.is_file() else []
        self._ids = lines if len(lines) == self.count else None

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]:
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for start in range(0, self.count, size):
                n = min(size, self.count - start)
                rows = np.fromfile(file, self._dtype, n * self.dimension).reshape(n, self.dimension)
                yield Chunk(_float32(rows), self._ids and self._ids[start : start + n])


class ParquetRows:
    """Rows of a column of lists of floats, in one Parquet file or several. A column `id` of strings names them."""

    def __init__(self, path: Path, files: Sequence[Path], column: str | None) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise RowsError("Parquet files need pyarrow: pip install 'fullrank-server[report]'") from error
        if not files:
            raise RowsError(f"{path}: an empty folder, or one without .parquet files")
        self.path = path
        self._files = files
        self._column = column or COLUMN
        self.count = 0
        self.dimension = 0
        self._named = True
        self.made_by = frozenset[tuple[str, str]]()
        for file in files:
            try:
                with pq.ParquetFile(file) as opened:
                    self._check(file, opened.schema_arrow, pa)
                    self.made_by |= _made_by(opened.schema_arrow.metadata or {})
                    self.count += opened.metadata.num_rows
            except pa.ArrowException as error:
                raise RowsError(f"{file}: not a Parquet file that can be read ({error})") from error
        if not self.dimension and self.count:  # lists of any length: the first that is there says how long
            self.dimension = next((c.rows.shape[1] for c in self.chunks() if c.rows.shape[1]), 0)
        _check_size(path, self.count, self.dimension)

    def _check(self, file: Path, schema: Any, pa: Any) -> None:
        """Find the column of rows. Raises RowsError, naming the columns there are."""
        floats = [it.name for it in schema if _is_list(it.type, pa) and pa.types.is_floating(it.type.value_type)]
        if self._column not in schema.names:
            found = f"its columns of float lists are {', '.join(floats)}" if floats else "none holds lists of floats"
            raise RowsError(
                f"{file}: no column {self._column!r}; it has {', '.join(schema.names) or 'none'}, and {found}: --column"
            )
        kind = schema.field(self._column).type
        if self._column not in floats:
            remedy = f"; try --column {floats[0]}" if floats else ""
            raise RowsError(f"{file}: column {self._column!r} holds {kind}, expected lists of floats{remedy}")
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else 0
        if self.dimension and width and width != self.dimension:
            raise RowsError(f"{file}: rows of width {width}, where earlier files have {self.dimension}")
        self.dimension = self.dimension or width
        self._named = self._named and "id" in schema.names and pa.types.is_string(schema.field("id").type)

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [self._column, *(["id"] if self._named else [])]
        for file in self._files:
            try:
                with pq.ParquetFile(file, pre_buffer=False) as opened:
                    for batch in opened.iter_batches(size, columns=columns, use_threads=False):
                        ids = [str(it) for it in batch.column("id").to_pylist()] if self._named else None
                        yield Chunk(self._rows(file, batch.column(self._column)), ids)
            except pa.ArrowException as error:
                raise RowsError(f"{file}: damaged ({error})") from error

    def _rows(self, file: Path, lists: Any) -> Tensor:
        """(n, d) float32; a null is a row of NaN."""
        valid = lists.is_valid().to_numpy(zero_copy_only=False)
        whole = lists.drop_null()
        flat = whole.flatten().to_numpy(zero_copy_only=False)
        n = len(whole)
        width = self.dimension or (len(whole[0]) if n else 0)
        lengths = np.diff(whole.offsets.to_numpy()) if n and hasattr(whole, "offsets") else np.full(n, width)
        if not (lengths == width).all():
            raise RowsError(f"{file}: rows of {int(lengths[lengths != width][0])} and of {width} values in one column")
        rows = np.full((len(lists), width), np.nan, np.float32)
        with np.errstate(over="ignore"):
            rows[valid] = flat.reshape(n, width)
        return torch.from_numpy(rows)


def _made_by(metadata: Mapping[bytes, bytes]) -> frozenset[tuple[str, str]]:
    """Name and revision of the encoder, as `fullrank embed --out` writes them."""
    said = [metadata.get(key, b"").decode(errors="replace") for key in (b"encoder", b"revision")]
    return frozenset({(said[0], said[1])}) if all(said) else frozenset()


def _is_list(kind: Any, pa: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_size(path: Path, count: int, dimension: int) -> None:
    if count < 2 or dimension < 2:
        raise RowsError(f"{path}: {count} rows of {dimension} values; a spectrum needs 2 rows of 2 values at least")


def _float32(rows: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is counted as not finite
        return torch.from_numpy(rows.astype(np.float32))
