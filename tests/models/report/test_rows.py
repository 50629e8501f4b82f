"""Rows are read from .npy and Parquet in chunks; what holds none is named with its remedy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.report.rows import RowsError, open_rows

ROWS = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)


def read(path: Path, column: str | None = None, size: int = 7) -> np.ndarray:
    return torch.cat([it.rows for it in open_rows(path, column).chunks(size)]).numpy()


def table(**columns: object) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_of_every_float(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "rows.npy", ROWS.astype(dtype))
    opened = open_rows(tmp_path / "rows.npy")
    assert (opened.count, opened.dimension) == ROWS.shape
    np.testing.assert_array_equal(read(tmp_path / "rows.npy"), ROWS.astype(dtype).astype(np.float32))


def test_names_lie_beside_a_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    names = [f"{i}.png" for i in range(98)] + ["a\u2028b\x85c.png", "d\x1ce.png"]
    (tmp_path / "rows.txt").write_text("".join(f"{name}\n" for name in names))
    ids = [name for it in open_rows(tmp_path / "rows.npy").chunks(30) for name in it.ids or ()]
    assert ids == names


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
def test_parquet_of_every_list_with_nulls(tmp_path: Path, kind: str) -> None:
    kinds = {
        "list": pa.list_(pa.float32()),
        "large_list": pa.large_list(pa.float64()),
        "fixed": pa.list_(pa.float32(), 8),
    }
    values = [row.tolist() for row in ROWS]
    values[3] = None  # type: ignore[call-overload]
    column = pa.array(values, kinds[kind])
    pq.write_table(
        table(id=[str(i) for i in range(100)], embedding=column), tmp_path / "rows.parquet", row_group_size=16
    )
    found = read(tmp_path / "rows.parquet")
    assert np.isnan(found[3]).all()
    kept = np.arange(100) != 3
    np.testing.assert_array_equal(found[kept], ROWS[kept])
    assert next(open_rows(tmp_path / "rows.parquet").chunks(4)).ids == ["0", "1", "2", "3"]


def test_a_folder_of_parquet_files_is_one(tmp_path: Path) -> None:
    for i, part in enumerate(np.split(ROWS, 4)):
        pq.write_table(table(vector=pa.array(part.tolist())), tmp_path / f"{i}.parquet")
    np.testing.assert_array_equal(read(tmp_path, "vector"), ROWS)


def saved(folder: Path, rows: np.ndarray) -> Path:
    np.save(folder / "rows.npy", rows)
    return folder / "rows.npy"


def cut(folder: Path) -> Path:
    path = saved(folder, ROWS)
    path.write_bytes(path.read_bytes()[:-5])
    return path


def parquet(folder: Path, content: pa.Table) -> Path:
    pq.write_table(content, folder / "rows.parquet")
    return folder / "rows.parquet"


def text(folder: Path, name: str) -> Path:
    (folder / name).write_text("no rows at all")
    return folder / name


BAD = {
    "three dimensions": (lambda it: saved(it, ROWS.reshape(10, 10, 8)), r"expected an array of shape \(n, d\)"),
    "integers": (lambda it: saved(it, ROWS.astype(np.int32)), "found int32; convert with .astype"),
    "columns first": (lambda it: saved(it, np.asfortranarray(ROWS)), "numpy.ascontiguousarray"),
    "objects": (lambda it: saved(it, np.array([[{}, 1.0]], object)), "found object"),
    "one row": (lambda it: saved(it, ROWS[:1]), "1 rows of 8 values"),
    "cut off": (cut, "5 bytes are missing"),
    "no npy": (lambda it: text(it, "rows.npy"), "not a .npy file"),
    "no parquet": (lambda it: text(it, "rows.parquet"), "not a Parquet file"),
    "no such column": (
        lambda it: parquet(it, table(vector=pa.array([[1.0, 2.0]] * 3), label=[1, 2, 3])),
        r"no column 'embedding'; it has vector, label, and its columns of float lists are vector: --column",
    ),
    "numbers": (lambda it: parquet(it, table(embedding=[1.0, 2.0])), "holds double, expected lists of floats"),
    "unlike rows": (
        lambda it: parquet(it, table(embedding=pa.array([[1.0, 2.0], [1.0, 2.0, 3.0]]))),
        "rows of 3 and of 2 values",
    ),
    "empty folder": (lambda it: it, "an empty folder"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_holds_no_rows_is_named(tmp_path: Path, bad: str) -> None:
    make, message = BAD[bad]
    path = make(tmp_path)
    with pytest.raises(RowsError, match=message) as error:
        open_rows(path)
    assert str(tmp_path) in str(error.value)
