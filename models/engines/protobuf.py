"""Writes ONNX files: the few protocol buffer messages of a graph, its nodes and its references to weights.

This file spares serving the `onnx` package, which takes 60 MB. Field numbers are those of onnx.proto (ONNX IR version
9). Tests read the result with that package.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

IR_VERSION, OPSET = 9, 20
FLOAT, UINT8 = 1, 2
DTYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.int64): 7}
VARINT = 0
BYTES = 2
FIXED32 = 5
Attribute = int | float | str | Sequence[int] | bytes  # bytes are a graph


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are their two's complement in 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | FIXED32) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _fields(number: int, values: Iterable[int | str | bytes]) -> bytes:
    return b"".join(_field(number, value) for value in values)


def _attribute(name: str, value: Attribute) -> bytes:
    """AttributeProto: name 1, f 2, i 3, s 4, g 6, ints 8, type 20."""
    if isinstance(value, int):
        content = _field(3, value)
        kind = 2
    elif isinstance(value, bytes):
        content = _field(6, value)
        kind = 5
    elif isinstance(value, float):
        content = _field(2, value)
        kind = 1
    elif isinstance(value, str):
        content = _field(4, value)
        kind = 3
    else:
        content = _fields(8, value)
        kind = 7
    return _field(1, name) + content + _field(20, kind)


def node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Attribute] | None = None
) -> bytes:
    """NodeProto: input 1, output 2, op_type 4, attribute 5. An absent optional input is the empty name."""
    own = [_attribute(name, value) for name, value in (attributes or {}).items()]
    return _fields(1, inputs) + _fields(2, outputs) + _field(4, operator) + _fields(5, own)


def constant(name: str, values: NDArray[np.float32 | np.int64]) -> bytes:
    """TensorProto that holds its values: dims 1, data_type 2, name 8, raw_data 9."""
    raw = np.ascontiguousarray(values).tobytes()
    return _fields(1, values.shape) + _field(2, DTYPES[values.dtype]) + _field(8, name) + _field(9, raw)


def external(name: str, shape: Sequence[int], location: str, offset: int) -> bytes:
    """TensorProto of float32 values that begin at a byte of another file: external_data 13, data_location 14."""
    length = 4 * int(np.prod(shape, dtype=np.int64))
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    places = [_field(1, key) + _field(2, value) for key, value in entries.items()]
    return _fields(1, shape) + _field(2, FLOAT) + _field(8, name) + _fields(13, places) + _field(14, 1)


def _value(name: str, kind: int, shape: Sequence[int | str]) -> bytes:
    """ValueInfoProto of a tensor; a dimension is a number or the name of one that may vary."""
    dimensions = [_field(1 if isinstance(it, int) else 2, it) for it in shape]
    return _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, _fields(1, dimensions))))


def branch(nodes: Sequence[bytes], result: str, shape: Sequence[int | str]) -> bytes:
    """GraphProto of a branch of an If: it takes nothing, uses names of the graph around it, and gives one tensor."""
    return _fields(1, nodes) + _field(2, result) + _field(12, _value(result, FLOAT, shape))


def model(
    nodes: Sequence[bytes],
    initializers: Sequence[bytes],
    given: tuple[str, Sequence[int | str]],
    result: tuple[str, Sequence[int | str]],
    producer: str,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """ModelProto of a graph with one uint8 input and one float32 output, each (name, shape). metadata_props is 14."""
    graph = _fields(1, nodes) + _field(2, "encoder") + _fields(5, initializers)
    graph += _field(11, _value(given[0], UINT8, given[1])) + _field(12, _value(result[0], FLOAT, result[1]))
    props = [_field(1, key) + _field(2, value) for key, value in (metadata or {}).items()]
    opset = _field(8, _field(2, OPSET))
    return _field(1, IR_VERSION) + _field(2, producer) + _field(7, graph) + opset + _fields(14, props)
