"""Reads an ONNX file: its graph, and its weights from other files, which must lie in its own folder."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.importers.base import SHOWN, ImportRefusedError, refuse_endless

DOMAINS = ("", "ai.onnx", "com.microsoft")  # operator domains that onnxruntime has itself


def opened(path: Path) -> tuple[Any, str]:
    """The model, with all its weights in it, and the hash of all its bytes. Raises ImportRefusedError, with a remedy.

    It runs nothing. Operators that need a library of foreign code are refused.
    """
    try:
        import onnx
    except ImportError:
        raise ImportRefusedError("ONNX files are read with the onnx package: pip install onnx") from None
    refuse_endless(path)
    try:
        model = onnx.load(path, load_external_data=False)
        digest = hashlib.sha256(path.read_bytes())
    except OSError as error:
        raise ImportRefusedError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # the parser's exceptions have no base class of their own
        raise ImportRefusedError(f"{path} is no ONNX file: {error}") from error
    if not model.graph.node:
        raise ImportRefusedError(f"{path} is no ONNX file: it has no graph")
    _standard(model)
    for tensor in _tensors(model.graph):
        _internalise(tensor, path, digest)
    return model, digest.hexdigest()


def graphs(graph: Any) -> Iterator[Any]:
    """The graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    for inner in graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _standard(model: Any) -> None:
    """Refuse operators that onnxruntime does not have itself: they would need a library of foreign code."""
    own = {(it.domain, it.name) for it in model.functions}
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    custom = sorted(
        {f"{it.domain}.{it.op_type}" for it in nodes if it.domain not in DOMAINS and (it.domain, it.op_type) not in own}
    )
    if custom:
        raise ImportRefusedError(
            f"it uses operators that are not ONNX's: {', '.join(custom[:SHOWN])}; export it with standard operators"
        )


def _internalise(tensor: Any, path: Path, digest: Any) -> None:
    """Read a tensor's external data into the tensor. The file must be in the model's own folder."""
    if tensor.data_location != 1:
        return
    places = {entry.key: entry.value for entry in tensor.external_data}
    location = places.get("location", "")
    folder = path.parent.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise ImportRefusedError(
            f"the weights of {tensor.name} lie in {location!r}, outside the model's folder, where nothing is read; put "
            "that file beside the model and its bare name into it (onnx.save with save_as_external_data=True does both)"
        )
    try:
        offset = int(places.get("offset", 0))
        size = file.stat().st_size
        length = int(places.get("length", size - offset))
        if not file.is_file():
            raise ImportRefusedError(f"{file}, which holds the weights of {tensor.name}, is no regular file")
        if length > (declared := _declared(tensor)):
            raise ImportRefusedError(f"{file}: {length} bytes for {tensor.name}, whose shape takes {declared}")
        if offset < 0 or length < 0 or offset + length > size:
            raise ImportRefusedError(f"{file} is {size} bytes, too short for {tensor.name}: copy it again")
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, ImportRefusedError):
            raise
        raise ImportRefusedError(f"{file}, which holds the weights of {tensor.name}: {error}") from error
    digest.update(tensor.raw_data)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _declared(tensor: Any) -> int:
    """The bytes that a tensor of this type and shape takes at most. Raises ValueError for an unknown type."""
    from onnx import helper

    try:
        width = int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        raise ValueError(f"unknown type {tensor.data_type}") from None
    return math.prod(max(0, int(it)) for it in tensor.dims) * width
