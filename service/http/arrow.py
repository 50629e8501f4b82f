"""Parses Arrow streams for POST /observe: a table of rows, with keys and inputs if it has them. Needs pyarrow.

What would take more memory than was received is refused: compressed buffers, dictionaries, and counts beyond the data.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.http.errors import Problem

ARROW = "application/vnd.apache.arrow.stream"
COLUMNS = ("rows", "inputs", "keys")
_RECORDS = 3  # Message.fbs: the header is a record batch


def columns(body: bytes) -> dict[str, Any]:
    """The columns of an Arrow IPC stream: rows and inputs as (n, d) float32, keys as (n,) integers or a list of bytes.

    Raises Problem 415 without pyarrow, and 422 for what is no such stream.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        message = "Arrow needs pyarrow: run pip install 'fullrank-server[bulk]' where the service runs, or send .npy"
        raise Problem(415, "unsupported_media_type", message, field="Content-Type") from error
    try:
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            _check_schema(pa, reader.schema)
            _check_plain(pa, body)
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
        table = pa.Table.from_batches(batches, reader.schema)
        return {name: _values(pa, table.column(name), name) for name in table.column_names}
    except (pa.ArrowException, struct.error, OSError, LookupError, ValueError, OverflowError, MemoryError) as error:
        raise _invalid("body", f"the body is no Arrow stream: {str(error)[:200]}") from error


def _invalid(field: str, message: str) -> Problem:
    return Problem(422, "invalid_field", message, field=field)


def _check_plain(pa: Any, body: bytes) -> None:
    """Raise Problem for a message that holds anything but a schema or an uncompressed batch of records."""
    for position, message in enumerate(pa.ipc.MessageReader.open_stream(pa.py_buffer(body))):
        if position == 0:
            continue  # the schema, which open_stream insists on
        compressed, kind = _header(message.metadata.to_pybytes())
        if kind != _RECORDS:
            what = "the stream holds more than batches of records, such as dictionaries; send plain columns"
            raise _invalid("body", what)
        if compressed:
            raise _invalid("body", "the stream's buffers are compressed; write it without compression")


def _header(data: bytes) -> tuple[bool, int]:
    """Whether a message's record batch is compressed, and the kind of the message: fields of Arrow's Message.fbs."""

    def field(table: int, slot: int) -> int:
        """Where a table's field lies; 0 if it is not there."""
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if vtable < 0 or 4 + 2 * slot >= struct.unpack_from("<H", data, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * slot)[0]
        return table + offset if offset else 0

    message = struct.unpack_from("<I", data, 0)[0]
    kind = data[at] if (at := field(message, 1)) else 0
    at = field(message, 2)
    batch = at + struct.unpack_from("<I", data, at)[0] if at else 0
    return bool(batch and field(batch, 3)), kind


def _check_schema(pa: Any, schema: Any) -> None:
    if not {"rows"} <= set(schema.names) <= set(COLUMNS) or len(set(schema.names)) != len(schema.names):
        raise _invalid("body", f"the stream must have a column rows, and may have inputs and keys, not {schema.names}")
    for name, kind in zip(schema.names, schema.types, strict=True):
        types = pa.types
        if name == "keys":
            whole = types.is_integer(kind) or types.is_string(kind) or types.is_binary(kind)
            if not (whole or types.is_large_string(kind)):
                raise _invalid("keys", f"keys must be integers, strings or binary, not {kind}")
            continue
        lists = types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)
        if not lists or not types.is_floating(kind.value_type):
            raise _invalid(name, f"{name} must be lists of floats, best of a fixed size, not {kind}")


def _values(pa: Any, column: Any, name: str) -> Any:
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if array.null_count:
        raise _invalid(name, f"{name} holds nulls; leave out rows that have none")
    if name == "keys":
        if pa.types.is_integer(array.type):
            return array.to_numpy()
        return [value if isinstance(value, bytes) else value.encode() for value in array.to_pylist()]
    return _lists(pa, array, name)


def _lists(pa: Any, array: Any, name: str) -> NDArray[np.float32]:
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
    else:
        lengths = np.diff(array.offsets.to_numpy())
        width = int(lengths[0]) if len(lengths) else 0
        if (lengths != width).any():
            raise _invalid(name, f"{name} must be lists of one length")
    values = array.flatten()
    if values.null_count:
        raise _invalid(name, f"{name} holds nulls; leave out rows that have none")
    with np.errstate(over="ignore"):
        rows: NDArray[np.float32] = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return rows.reshape(len(array), width)
