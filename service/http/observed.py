"""Parses requests to POST /observe: rows of embeddings, and what may come with them.

JSON has all of it in lists, safetensors all of it in tensors, an Arrow stream all but the canary, a .npy file the rows
alone. None is unpickled, and none takes more memory than a few times the bytes received.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fullrank.descriptors import THUMBNAIL, thumbnails
from fullrank.stored import tensors_in
from service.http import arrow
from service.http.errors import Problem
from service.http.payload import json_object
from service.watching.observation import Observation
from service.watching.sidecar import MAX_DIMENSION

SAFETENSORS = "application/x-safetensors"
ARRAYS: tuple[str, ...] = ("rows", "inputs", "canary")
FIELDS = (*ARRAYS, "keys")
MAX_SIDE = 64  # pixels of a thumbnail's side; larger ones are images


def from_json(body: bytes) -> tuple[Any, Observation]:
    """The model and what was observed, of {"model", "rows", "keys", "inputs", "canary"}. Raises Problem."""
    value = json_object(body)
    complete = "model" in value and value.keys() & {"rows", "canary"}
    if not complete or not value.keys() <= {"model", *FIELDS}:
        message = 'the body must be {"model": name, "rows": [[...], ...]}; it may hold keys, inputs, canary too'
        raise _invalid("body", message)
    given = {name: _numbers(value[name], name) for name in ARRAYS if name in value}
    return value["model"], _observation(given, _keys(value["keys"]) if "keys" in value else None)


def from_npy(body: bytes) -> Observation:
    """The rows of a .npy file of floats, without pickle and without allocating more than the bytes received."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    # numpy parses the header with Python's own parser, which may raise many kinds of exceptions.
    except Exception as error:
        message = "the body is no .npy file whose header can be read; send what numpy.save writes"
        raise _invalid("body", message) from error
    data = body[file.tell() :]
    # A header may also declare a dimension of -1 or True.
    sane = all(type(side) is int and side >= 0 for side in shape)
    if dtype.kind != "f" or fortran or not sane or math.prod(shape) * dtype.itemsize != len(data):
        raise _invalid("body", f"expected C-ordered floats filling the file; its header says {dtype} {shape}")
    with np.errstate(over="ignore"):
        return _observation({"rows": np.frombuffer(data, dtype).reshape(shape).astype(np.float32)}, None)


def from_safetensors(body: bytes) -> Observation:
    """What was observed: tensors rows, keys (n,) int, inputs, thumbnails (n, c, s, s) uint8, canary. Raises Problem."""
    try:
        tensors = tensors_in(body)
    except ValueError as error:
        raise _invalid("body", f"the body is {error}") from error
    allowed = (*FIELDS, "thumbnails")
    if unknown := sorted(tensors.keys() - set(allowed)):
        raise _invalid("body", f"unknown tensor {unknown[0]!r}; the file may hold {', '.join(allowed)}")
    given = {name: _floats(tensors[name], name) for name in ARRAYS if name in tensors}
    if "thumbnails" in tensors:
        if "inputs" in given:
            raise _invalid("thumbnails", "send inputs or thumbnails, of which inputs are made, not both")
        given["inputs"] = _described(tensors["thumbnails"])
    keys = None
    if (hashes := tensors.get("keys")) is not None:
        if hashes.ndim != 1 or hashes.is_floating_point() or hashes.is_complex():
            raise _invalid("keys", f"keys must be (n,) integers, not {tuple(hashes.shape)} of {hashes.dtype}")
        keys = hashes.numpy()
    return _observation(given, keys)


def from_arrow(body: bytes) -> Observation:
    """What was observed: columns rows and inputs, lists of floats, and keys. Raises Problem."""
    given = arrow.columns(body)
    keys = given.pop("keys", None)
    return _observation(given, keys)


def _invalid(field: str, message: str) -> Problem:
    return Problem(422, "invalid_field", message, field=field)


def _observation(given: Mapping[str, NDArray[np.float32]], keys: Any) -> Observation:
    if not given.keys() & {"rows", "canary"}:
        raise _invalid("rows", "there are no rows; send rows, or a canary's embeddings, or both")
    for name, values in given.items():
        _check(values, name, 1 if name == "inputs" else 2)
    rows = given.get("rows")
    inputs = given.get("inputs")
    if rows is None and (keys is not None or inputs is not None):
        raise _invalid("rows", "keys and inputs belong to rows, and there are none")
    for name, other in (("keys", keys), ("inputs", inputs)):
        if rows is not None and other is not None and len(other) != len(rows):
            raise _invalid(name, f"{name}: expected {len(rows)}, one a row, got {len(other)}")
    return Observation(rows, keys, inputs, given.get("canary"))


def _check(values: NDArray[np.float32], name: str, least: int) -> None:
    if values.ndim != 2 or not least <= values.shape[1] <= MAX_DIMENSION or not len(values):
        shape = f"(n, d) with n >= 1 and {least} <= d <= {MAX_DIMENSION}"
        raise _invalid(name, f"{name} must be {shape}, not of shape {values.shape}")


def _numbers(value: Any, name: str) -> NDArray[np.float32]:
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise _invalid(name, f"{name} must be a list of lists of numbers")
    for index, row in enumerate(value):
        if not set(map(type, row)) <= {int, float}:
            message = f"{name}[{index}] holds something that is no number; leave out rows that have none"
            raise _invalid(f"{name}[{index}]", message)
    try:
        # Values that overflow become infinite and are counted as not finite, so numpy need not warn in the log.
        with np.errstate(over="ignore"):
            return np.array(value, np.float32)
    except (ValueError, TypeError) as error:
        raise _invalid(name, f"{name} must be lists of numbers of one length: {error}") from error


def _keys(value: Any) -> list[bytes]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int, str}:
        raise _invalid("keys", "keys must be a list of strings or integers, one a row")
    return [str(key).encode("utf-8", "surrogatepass") for key in value]


def _floats(tensor: Tensor, name: str) -> NDArray[np.float32]:
    if not tensor.is_floating_point() or tensor.ndim != 2:
        raise _invalid(name, f"{name} must be (n, d) of a floating dtype, not {tuple(tensor.shape)} of {tensor.dtype}")
    rows: NDArray[np.float32] = tensor.float().numpy()
    return rows


def _described(images: Tensor) -> NDArray[np.float32]:
    """The descriptors of thumbnails, as this service makes them of its own traffic."""
    shape = tuple(images.shape)
    square = len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3] and THUMBNAIL <= shape[2] <= MAX_SIDE
    if str(images.dtype) != "torch.uint8" or not square:
        sides = f"with c 1 or 3 and s from {THUMBNAIL} to {MAX_SIDE}"
        raise _invalid("thumbnails", f"thumbnails must be (n, c, s, s) uint8 {sides}, not {shape} of {images.dtype}")
    return thumbnails(images.numpy())
