"""Arrow streams for POST /observe: what a table holds arrives, and nothing hostile is unpacked."""

import contextlib
import sys
from typing import Any

import numpy as np
import pytest

from service.http.arrow import columns
from service.http.errors import Problem
from service.http.observed import from_arrow

pa = pytest.importorskip("pyarrow")
ROWS = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


def lists(rows: np.ndarray, kind: Any = None, width: int | None = None) -> Any:
    kind = kind or pa.float32()
    flat = pa.array(rows.astype(kind.to_pandas_dtype()).reshape(-1), kind)
    if width is None:
        return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * width, flat)


def stream(table: Any, compression: str | None = None, chunk: int = 1000) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return bytes(sink.getvalue().to_pybytes())


def refused(body: bytes) -> Problem:
    with pytest.raises(Problem) as caught:
        from_arrow(body)
    return caught.value


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_rows_keys_and_inputs_arrive_as_they_were(kind: Any, chunk: int) -> None:
    table = pa.table({"rows": lists(ROWS, kind), "keys": np.arange(40), "inputs": lists(ROWS[:, :2], width=2)})
    found = from_arrow(stream(table, chunk=chunk))
    assert found.rows is not None
    assert found.inputs is not None
    np.testing.assert_array_equal(found.rows, ROWS.astype(kind.to_pandas_dtype()).astype(np.float32))
    np.testing.assert_array_equal(found.inputs, ROWS[:, :2])
    assert list(found.keys) == list(range(40))  # type: ignore[arg-type]


def test_a_part_of_a_table_and_keys_of_text_or_bytes_arrive() -> None:
    table = pa.table({"rows": lists(ROWS), "keys": [f"key {i}" for i in range(40)]}).slice(10, 5)
    found = from_arrow(stream(table))
    np.testing.assert_array_equal(found.rows, ROWS[10:15])
    assert found.keys == [f"key {i}".encode() for i in range(10, 15)]
    binary = pa.table({"rows": lists(ROWS[:1]), "keys": pa.array([b"\xff\0"])})
    assert from_arrow(stream(binary)).keys == [b"\xff\0"]


@pytest.mark.parametrize(
    ("table", "field", "words"),
    [
        ({"inputs": lists(ROWS)}, "body", "must have a column rows"),
        ({"rows": lists(ROWS), "labels": np.arange(40)}, "body", "may have inputs and keys"),
        ({"rows": np.arange(4.0)}, "rows", "must be lists of floats"),
        ({"rows": pa.array([[1, 2]])}, "rows", "must be lists of floats"),
        ({"rows": pa.array([[1.0, 2.0], [1.0]])}, "rows", "lists of one length"),
        ({"rows": pa.array([[1.0, 2.0], None])}, "rows", "holds nulls"),
        ({"rows": pa.array([[1.0, None]])}, "rows", "holds nulls"),
        ({"rows": lists(ROWS), "keys": ROWS[:, 0]}, "keys", "integers, strings or binary"),
        ({"rows": lists(ROWS), "keys": pa.array(["a"] * 40).dictionary_encode()}, "keys", "integers, strings"),
        ({"rows": lists(ROWS[:0])}, "rows", "n >= 1"),
        ({"rows": lists(ROWS[:, :1])}, "rows", "2 <= d"),
    ],
)
def test_what_does_not_fit_is_named(table: dict[str, Any], field: str, words: str) -> None:
    problem = refused(stream(pa.table(table)))
    assert (problem.status_code, problem.field) == (422, field)
    assert words in problem.message


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_before_they_are_unpacked(compression: str) -> None:
    body = stream(pa.table({"rows": lists(np.zeros((50_000, 64), np.float32))}), compression)
    assert len(body) < 200_000
    before = pa.total_allocated_bytes()
    assert "compressed" in refused(body).message
    assert pa.total_allocated_bytes() - before < 2**20


def test_damaged_streams_are_refused_and_never_crash() -> None:
    body = stream(pa.table({"rows": lists(ROWS, width=6), "keys": [f"key {i}" for i in range(40)]}))
    generator = np.random.default_rng(1)
    for cut in range(0, len(body) - 8, 97):
        assert refused(body[:cut]).status_code == 422
    for _ in range(400):
        bad = bytearray(body)
        bad[generator.integers(len(bad) // 2)] = generator.integers(256)
        with contextlib.suppress(Problem):  # any other exception fails, and a crash fails all
            columns(bytes(bad))


def test_without_pyarrow_a_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    problem = refused(b"")
    assert problem.status_code == 415
    assert "pip install 'fullrank-server[bulk]'" in problem.message
