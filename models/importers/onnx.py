"""Imports an encoder from an ONNX file: checks it, gives it our input and output, moves its weights to safetensors.

The stored graph takes pixels (n, c, s, s) uint8, scales and normalises them unless the original takes uint8, runs the
original graph, pools, and returns rows (n, d) float32. This needs the `onnx` package, which serving does not.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from models.artifact import WEIGHTS, Graph
from models.engines.engine import affine
from models.engines.trace import PIXELS, RECORD, ROWS
from models.exporting import offsets
from models.importers.base import ImportRefusedError, Questions, imagenet
from models.importers.onnx_file import graphs, opened
from models.preprocess import Preprocessing

USUAL = imagenet()
PATIENCE = 120.0  # seconds for two images; a graph may hold a loop without end
INLINE = 1024  # bytes; smaller weights stay in the graph, among them shapes that the runtime must know
CLASSES = (10, 100, 1000, 1001, 21841, 21843)  # usual numbers of classes of classifiers
SCORES = ("logit", "prob", "softmax", "class", "score")
AGREE = 1e-3
UINT8 = 2
LEAST_PIXELS = 8  # height and width of the input, as a card may state them
MOST_PIXELS = 2048


@dataclass(frozen=True)
class Recorded:
    """What `fullrank export` writes into the metadata of an ONNX file."""

    name: str
    preprocessing: Preprocessing
    licence: str
    nested_dimensions: tuple[int, ...]


@dataclass(frozen=True)
class Imported:
    path: Path
    sha256: str
    graph: Graph
    preprocessing: Preprocessing
    dimension: int
    recorded: Recorded | None


def read(
    path: Path, questions: Questions, choose: Callable[[Preprocessing, int], Preprocessing], pool: str | None
) -> Imported:
    """Read the encoder in an ONNX file. Raises ImportRefusedError, with a remedy, if it is no image encoder.

    choose: gives the preprocessing, from the file's own or the usual one, for the input's number of channels.
    """
    model, digest = opened(path)
    given = _input(model)
    recorded = _recorded(model)
    own = recorded.preprocessing if recorded else USUAL
    how = _sized(given, choose(own, given.type.tensor_type.shape.dim[1].dim_value or own.channels), questions)
    if given.type.tensor_type.elem_type == UINT8:
        how = _as_they_are(how, recorded, questions)
    output = _output(model, questions)
    _framed(model, given, output, how)
    weights = _moved(model)
    rows = _answers(model, weights, how, output)
    if rows.ndim > 2:
        _pool(model, rows.ndim, pool, questions)
        rows = _answers(model, weights, how, output)
    elif pool is not None:
        raise ImportRefusedError(f"--pool {pool}: its output {output} is one row an image already")
    _last(model, output, rows.shape[1], questions)
    graph = Graph(model.SerializeToString(), weights)
    return Imported(path, digest, graph, how, int(rows.shape[1]), recorded)


def _recorded(model: Any) -> Recorded | None:
    """The record of `fullrank export` in the file's metadata, if it has one. Raises ImportRefusedError if damaged."""
    text = next((it.value for it in model.metadata_props if it.key == RECORD), None)
    if text is None:
        return None
    try:
        return TypeAdapter(Recorded).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ImportRefusedError(
            f"the metadata that fullrank export wrote into it is damaged ({where}: {first['msg']}); export it again"
        ) from error


def _as_they_are(how: Preprocessing, recorded: Recorded | None, questions: Questions) -> Preprocessing:
    """The preprocessing of a graph that takes pixels of 0 to 255 and normalises them itself."""
    if given := [key for key in ("scale", "mean", "std") if key in questions.settings]:
        raise ImportRefusedError(f"--set {given[0]}: its input takes pixels of 0 to 255; it normalises them itself")
    for key in ("mean", "std"):
        questions.assumed.pop(key, None)
    if recorded is not None:
        inside = recorded.preprocessing
        return how.model_copy(update={"scale": inside.scale, "mean": inside.mean, "std": inside.std})
    questions.assumed["normalisation"] = "inside the graph, whose input takes pixels of 0 to 255 (--set cannot)"
    return how.model_copy(update={"scale": 1.0, "mean": (0.0,) * how.channels, "std": (1.0,) * how.channels})


def _input(model: Any) -> Any:
    """The input, which must be one image batch. Raises ImportRefusedError for another number, type, rank or batch."""
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [it for it in model.graph.input if it.name not in held]
    if len(inputs) != 1:
        names = ", ".join(it.name for it in inputs) or "none"
        raise ImportRefusedError(
            f"it has {len(inputs)} inputs ({names}); an image encoder has one, the pixels; "
            "export the image tower alone, or with the other inputs as constants"
        )
    kind = inputs[0].type.tensor_type
    shape = kind.shape.dim
    name = inputs[0].name
    if kind.elem_type not in (1, UINT8, 10, 11):
        raise ImportRefusedError(
            f"its input {name} takes neither floating-point numbers nor uint8; export it from the normalised image "
            "on, or from pixels of 0 to 255 in uint8"
        )
    if len(shape) != 4:
        raise ImportRefusedError(
            f"its input {name} has {len(shape)} dimensions; (n, channels, height, width) is needed"
        )
    if shape[0].HasField("dim_value"):
        raise ImportRefusedError(
            f"its batch is fixed at {shape[0].dim_value}; export it again with a dynamic batch "
            "(torch.onnx.export(..., dynamic_shapes={'x': {0: 'n'}}))"
        )
    if shape[1].HasField("dim_value") and shape[1].dim_value not in (1, 3):
        raise ImportRefusedError(
            f"its input has {shape[1].dim_value} channels in second place; 1 or 3 are needed, channels before height"
        )
    return inputs[0]


def _sized(given: Any, how: Preprocessing, questions: Questions) -> Preprocessing:
    """The preprocessing with the input's size, if the graph fixes it."""
    _, _, height, width = given.type.tensor_type.shape.dim
    sides = {it.dim_value for it in (height, width) if it.HasField("dim_value")}
    if len(sides) > 1:
        raise ImportRefusedError(
            f"its input is {height.dim_value} x {width.dim_value} pixels; only square ones are supported"
        )
    if sides and not LEAST_PIXELS <= max(sides) <= MOST_PIXELS:
        raise ImportRefusedError(
            f"its input is {max(sides)} pixels high and wide; {LEAST_PIXELS} to {MOST_PIXELS} are supported"
        )
    if sides and (side := sides.pop()) != how.size:
        if "size" in questions.settings:
            raise ImportRefusedError(f"--set size={how.size}: its input is fixed at {side} x {side} pixels")
        questions.assumed["size"] = f"{side}, as its input is"
        how = how.model_copy(update={"size": side, "to": round(side * how.target / how.size)})
    return how


def _output(model: Any, questions: Questions) -> str:
    """The name of the tensor that is the embedding: the first output, or the one that the user names."""
    first = model.graph.output[0].name if model.graph.output else ""
    name = questions.ask("output", first)
    known = {output for node in model.graph.node for output in node.output}
    if name not in known:
        some = ", ".join(it.name for it in model.graph.output)
        raise ImportRefusedError(f"--set output={name}: it computes no such tensor; its outputs are {some}")
    return name


def _free(name: str) -> str:
    """The name, changed if it is one that our own nodes use."""
    return f"source_{name}" if name in (PIXELS, ROWS) or name.startswith("fullrank_") else name


def _rename(graph: Any) -> None:
    """Rename the tensors of a graph that have names which our own nodes use."""
    for node in graph.node:
        node.input[:] = [_free(name) for name in node.input]
        node.output[:] = [_free(name) for name in node.output]
    for part in (graph.initializer, graph.input, graph.output):
        for it in part:
            it.name = _free(it.name)


def _framed(model: Any, given: Any, output: str, how: Preprocessing) -> None:
    """Put scaling and normalisation before the graph, and make `output` its only output."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    for part in graphs(graph):
        _rename(part)
    kind = given.type.tensor_type.elem_type
    if kind == UINT8:  # the graph normalises
        before = [helper.make_node("Identity", [PIXELS], [_free(given.name)])]
    else:
        factor, offset = affine(how)
        graph.initializer.append(numpy_helper.from_array(factor.numpy(), "fullrank_factor"))
        graph.initializer.append(numpy_helper.from_array(offset.numpy(), "fullrank_offset"))
        before = [
            helper.make_node("Cast", [PIXELS], ["fullrank_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["fullrank_float", "fullrank_factor"], ["fullrank_scaled"]),
            helper.make_node("Add", ["fullrank_scaled", "fullrank_offset"], ["fullrank_normal"]),
            helper.make_node("Cast", ["fullrank_normal"], [_free(given.name)], to=kind),
        ]
    after = helper.make_node("Cast", [_free(output)], [ROWS], to=TensorProto.FLOAT)
    nodes, read = _needed([*before, *graph.node, after])
    del graph.node[:]
    graph.node.extend(nodes)
    weights = [it for it in graph.initializer if it.name in read]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    shape = ["n", how.channels, how.size, how.size]
    held = {tensor.name for tensor in graph.initializer}
    kept = [it for it in graph.input if it.name in held]
    del graph.input[:]
    graph.input.extend([helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape), *kept])
    del graph.output[:]
    graph.output.extend([helper.make_tensor_value_info(ROWS, TensorProto.FLOAT, None)])
    del graph.value_info[:]


def _needed(nodes: list[Any]) -> tuple[list[Any], set[str]]:
    """The nodes that the last one needs, in their order, and the names that they read."""
    read = set(nodes[-1].input)
    kept = [nodes[-1]]
    for node in reversed(nodes[:-1]):
        if read.isdisjoint(node.output):
            continue
        kept.append(node)
        inner = [it.g for it in node.attribute if it.HasField("g")] + [it for a in node.attribute for it in a.graphs]
        read.update(node.input, *(part.input for graph in inner for it in graphs(graph) for part in it.node))
    return kept[::-1], read


def _moved(model: Any) -> dict[str, torch.Tensor]:
    """Move the larger weights out of the graph, which keeps their shapes and places. Returns them by name."""
    from onnx import numpy_helper

    weights: dict[str, torch.Tensor] = {}
    for tensor in model.graph.initializer:
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, MemoryError) as error:
            raise ImportRefusedError(f"{tensor.name} is damaged: {error}; copy the file again") from error
        if array.nbytes < INLINE or array.dtype.kind not in "fiub" or array.dtype.str[1:] in ("u2", "u4", "u8"):
            continue
        weights[tensor.name] = torch.from_numpy(array.copy())
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = 1
        place = tensor.external_data.add()
        place.key = "location"
        place.value = WEIGHTS
    if not weights:
        raise ImportRefusedError("it has no weights: this is no encoder")
    for name, values in weights.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ImportRefusedError(
                f"{name} holds values that are not finite: the training diverged, or the file is damaged"
            )
    _place(model, weights)
    return weights


def _place(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Say where in the safetensors file each weight lies. Any tool can then read the graph beside that file.

    The layout is safetensors' own, so the file is written once for its header.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, WEIGHTS)
        save_file(weights, path)
        with path.open("rb") as file:
            length = file.read(8)
            places = offsets(length + file.read(int.from_bytes(length, "little")))
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            for key, value in (("offset", places[tensor.name]), ("length", weights[tensor.name].nbytes)):
                tensor.external_data.add(key=key, value=str(value))


def _answers(model: Any, weights: dict[str, torch.Tensor], how: Preprocessing, output: str) -> NDArray[np.float32]:
    """The output for two images. Raises ImportRefusedError if the graph cannot run or a row depends on its batch."""
    from models.engines.engine import EngineError
    from models.engines.onnx_engine import OnnxEngine

    pixels = np.random.default_rng(0).integers(0, 256, (2, how.channels, how.size, how.size), dtype=np.uint8)
    try:
        engine = OnnxEngine(model.SerializeToString(), weights, torch.get_num_threads())
        both = engine.within(PATIENCE, pixels)
        alone = engine.within(PATIENCE, pixels[:1])
    except EngineError as error:
        raise ImportRefusedError(str(error)) from error
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise ImportRefusedError(
            f"it does not run on {how.size} x {how.size} pixels: {str(error).strip()[:500]}"
        ) from error
    if both.ndim not in (2, 3, 4) or len(both) != 2:
        raise ImportRefusedError(
            f"its output {output} is {both.shape} for two images; (n, d), (n, tokens, d) or (n, d, h, w) is needed"
        )
    if not np.isfinite(both).all():
        raise ImportRefusedError("its rows are not finite: the weights are damaged, or overflow (float16?)")
    if np.abs(both[:1] - alone).max() > AGREE * np.abs(both).max():
        raise ImportRefusedError("an image's row depends on the other images of its batch: export it in eval mode")
    return both


def _pool(model: Any, ndim: int, pool: str | None, questions: Questions) -> None:
    """Pool tokens or positions between the embedding's tensor and the output."""
    from onnx import helper, numpy_helper

    graph = model.graph
    graph.node[-1].output[0] = "fullrank_unpooled"
    if ndim == 4:
        if pool not in (None, "mean", "avg"):
            raise ImportRefusedError(f"--pool {pool}: its output is a map of positions, which are averaged")
        nodes = [
            helper.make_node("GlobalAveragePool", ["fullrank_unpooled"], ["fullrank_pooled"]),
            helper.make_node("Flatten", ["fullrank_pooled"], [ROWS], axis=1),
        ]
        questions.assumed["pool"] = "mean over positions"
    elif pool in ("mean", "avg"):
        version = max((it.version for it in model.opset_import if it.domain in ("", "ai.onnx")), default=1)
        if version >= 18:
            graph.initializer.append(numpy_helper.from_array(np.array([1]), "fullrank_axes"))
            nodes = [helper.make_node("ReduceMean", ["fullrank_unpooled", "fullrank_axes"], [ROWS], keepdims=0)]
        else:
            nodes = [helper.make_node("ReduceMean", ["fullrank_unpooled"], [ROWS], axes=[1], keepdims=0)]
    elif pool in (None, "cls", "class"):
        if pool is None:
            questions.assumed["pool"] = "cls, the first token (--pool chooses; mean is over all tokens)"
        graph.initializer.append(numpy_helper.from_array(np.array(0), "fullrank_first"))
        nodes = [helper.make_node("Gather", ["fullrank_unpooled", "fullrank_first"], [ROWS], axis=1)]
    else:
        raise ImportRefusedError(f"--pool {pool}: choose cls or mean for an ONNX file")
    graph.node.extend(nodes)


def _last(model: Any, output: str, dimension: int, questions: Questions) -> None:
    """Refuse class scores in place of an embedding, unless the user names that output."""
    if "output" in questions.settings:
        return
    makers = {name: node for node in model.graph.node for name in node.output}
    maker = makers[_free(output)]
    scores = any(word in output.lower() for word in SCORES) or maker.op_type == "Softmax"
    if not scores and not (dimension in CLASSES and maker.op_type in ("Gemm", "Add", "MatMul")):
        return
    while maker.op_type not in ("Gemm", "MatMul", "Conv") and maker.input and maker.input[0] in makers:
        maker = makers[maker.input[0]]
    before = maker.input[0] if maker.input else ""
    raise ImportRefusedError(
        f"its output {output} of {dimension} numbers looks like class scores, which are no "
        "embedding; the tensor before "
        f"its last layer is {before!r}: --set output={before} (or --set output={output} if it is an embedding)"
    )
