"""Converts a PyTorch encoder to an ONNX graph, by recording two forward passes.

Every operation that PyTorch dispatches is recorded and translated by `operators`. The two passes have batches of
different sizes, which shows the dimensions that depend on the batch. The encoder's source is not read. `engines.start`
compares the graph with the encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.engines import protobuf
from models.engines.protobuf import Attribute

PIXELS, ROWS = "pixels", "rows"
PRODUCER = "fullrank"
RECORD = "fullrank"  # the key, among an ONNX file's metadata, of what its graph does not say


class UnsupportedError(ValueError):
    """Raised for an operation that cannot be translated. The message names it."""


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Attribute]

    def serialized(self) -> bytes:
        """The node as it stands in an ONNX file."""
        return protobuf.node(self.operator, self.inputs, self.outputs, self.attributes)


@dataclass(frozen=True)
class Graph:
    """A graph from `pixels` (n, c, h, w) uint8 to `rows` (n, d) float32. Weights have their names in the state dict.

    maps: (c, h, w) of each result of shape (n, c, h, w), by its name.
    """

    nodes: list[Node]
    constants: dict[str, NDArray[Any]]
    weights: dict[str, Tensor]
    shape: tuple[int, int, int]
    dimension: int
    maps: dict[str, tuple[int, int, int]]

    def serialized(
        self, location: str, offsets: dict[str, int] | None = None, metadata: dict[str, str] | None = None
    ) -> bytes:
        """The ONNX file's bytes. `offsets` says where each weight begins in the file `location`; None puts all at 0."""
        nodes = [node.serialized() for node in self.nodes]
        tensors = [protobuf.constant(name, values) for name, values in self.constants.items()]
        for name, tensor in self.weights.items():
            tensors.append(protobuf.external(name, tensor.shape, location, offsets[name] if offsets else 0))
        given, result = (PIXELS, ("n", *self.shape)), (ROWS, ("n", self.dimension))
        return protobuf.model(nodes, tensors, given, result, PRODUCER, metadata)


class Writer:
    """Collects the nodes of a graph. The functions of `operators` write to it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self._names: dict[int, str] = {}  # names of tensors, by id()
        self._weights = {id(tensor): name for name, tensor in weights.items()}
        self._stores = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        self._moving: set[int] = set()  # id() of tensors that depend on the input or on the size of the batch
        self._alive: list[Tensor] = []  # keeps the tensors alive, so that no id() is used twice
        self.maps: dict[str, tuple[int, int, int]] = {}  # (c, h, w) of results (n, c, h, w), by name
        self.shape: list[int] = []  # shape of the result being written; -1 for the dimension of the batch

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Attribute) -> Any:
        """Add a node. Returns the name of its output, or the names if there are several."""
        names = [f"{operator.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(Node(operator, inputs, names, attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any) -> str:
        """Store values in the graph, int64 for whole numbers, otherwise float32. Returns their name."""
        array = np.asarray(values)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = array
        return name

    def value(self, operand: Any) -> str:
        """The name of an operand, which is a tensor or a number."""
        if not isinstance(operand, Tensor):
            return self.constant(float(operand))
        name = self._names.get(id(operand)) or self._weights.get(id(operand))
        if name is None:
            if operand.dtype != torch.float32:
                raise UnsupportedError(f"a constant of {operand.dtype}")
            name = self._names[id(operand)] = self.constant(operand.detach().cpu().numpy())
            self._alive.append(operand)
        return name

    def sizes(self) -> str:
        """The shape of the result being written, in the form that Reshape takes."""
        if self.shape.count(-1) > 1:
            raise UnsupportedError(f"a shape {self.shape} that follows the batch twice")
        return self.constant(np.array(self.shape, np.int64))

    def expand(self, x: str) -> str:
        """Expand x to the shape of the result being written."""
        if -1 not in self.shape:
            return str(self.node("Expand", x, self.sizes()))
        batch = self.node("Shape", PIXELS, start=0, end=1)
        parts = [batch if size == -1 else self.constant(np.array([size])) for size in self.shape]
        return str(self.node("Expand", x, self.node("Concat", *parts, axis=0)))

    def bind(self, tensor: Tensor, name: str, *, moves: bool = True) -> None:
        """Give a tensor a name. moves: whether it depends on the input or on the size of the batch."""
        self._names[id(tensor)] = name
        self._alive.append(tensor)
        if tensor.ndim == 4:
            self.maps[name] = (tensor.shape[1], tensor.shape[2], tensor.shape[3])
        if moves:
            self._moving.add(id(tensor))

    def moves(self, tensor: Tensor) -> bool:
        return id(tensor) in self._moving

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight or a view of one, which the graph must not store a second time."""
        return tensor.untyped_storage().data_ptr() in self._stores


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False. For True, PyTorch would import its whole compiler, which takes seconds and 150 MB."""
        return False


class _Shapes(_Watch):  # type: ignore[no-untyped-call]
    """Records the shapes of every operation's results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[list[torch.Size]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.shapes.append([tensor.shape for tensor in _tensors(result)])
        return result


class _Recorder(_Watch):  # type: ignore[no-untyped-call]
    """Writes each operation to the graph as it runs."""

    def __init__(self, writer: Writer, other: list[list[torch.Size]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writer = writer
        self._other = other
        self._count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from models.engines.operators import OPERATORS

        result = function(*args, **(kwargs or {}))
        results = _tensors(result)
        writer = self._writer
        if self._count >= len(self._other) or len(self._other[self._count]) != len(results):
            raise UnsupportedError("a pass that takes another course for another number of images")
        others = self._other[self._count]
        shapes = [_varying(tensor.shape, other) for tensor, other in zip(results, others, strict=True)]
        self._count += 1
        moves = any(writer.moves(tensor) for tensor in _tensors((args, kwargs))) or any(-1 in it for it in shapes)
        if not results or not (moves or any(writer.is_weight(tensor) for tensor in results)):
            return result  # a constant; it is stored in the graph if an operation on the input uses it
        name = function.overloadpacket.__name__
        if any(tensor.dtype != torch.float32 for tensor in results):
            raise UnsupportedError(f"the operation {name} to {results[0].dtype}")
        write: Callable[..., str | list[str]] | None = OPERATORS.get(name.removesuffix("_"))
        if write is None:
            raise UnsupportedError(f"the operation {name}")
        writer.shape = shapes[0]
        try:
            names = write(writer, *args, **(kwargs or {}))
        except TypeError as error:
            raise UnsupportedError(f"the operation {name} with such arguments ({error})") from error
        for tensor, own in zip(results, [names] if isinstance(names, str) else names, strict=False):
            writer.bind(tensor, own, moves=moves)
        return result


def _varying(shape: torch.Size, other: torch.Size) -> list[int]:
    if len(shape) != len(other):
        raise UnsupportedError("a pass that takes another course for another number of images")
    return [a if a == b else -1 for a, b in zip(shape, other, strict=True)]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return _tensors(list(values.values()))
    return [tensor for it in values for tensor in _tensors(it)] if isinstance(values, (tuple, list)) else []


@torch.inference_mode()
def trace(encoder: nn.Module, pixels: Tensor, scale: Tensor, offset: Tensor) -> tuple[Graph, Tensor]:
    """Record the graph of encoder(pixels * scale + offset). Returns it with the rows of `pixels` (m, c, h, w) uint8.

    m is at least 3: the first pass has one image, the second the others. The encoder is float32, in eval mode and on
    the CPU. scale and offset are (1, c, 1, 1). Raises UnsupportedError for an operation that `operators` lacks.
    """
    weights = dict(encoder.state_dict(keep_vars=True))
    writer = Writer(weights)
    shapes = _Shapes()
    some, x = (part.float().mul_(scale).add_(offset) for part in (pixels[:1], pixels[1:]))
    if len(x) == len(some):
        raise ValueError("the two batches must differ in size")
    with shapes:
        fewer = encoder(some)
    cast = writer.node("Cast", PIXELS, to=protobuf.FLOAT)
    scaled = writer.node("Mul", cast, writer.constant(scale.numpy()))
    writer.bind(x, writer.node("Add", scaled, writer.constant(offset.numpy())))
    with _Recorder(writer, shapes.shapes):
        rows = encoder(x)
    nodes = _needed(writer.nodes, writer.value(rows))
    nodes.append(Node("Identity", [writer.value(rows)], [ROWS], {}))
    used = {name for node in nodes for name in node.inputs}
    constants = {name: values for name, values in writer.constants.items() if name in used}
    own = {name: tensor for name, tensor in weights.items() if name in used}
    graph = Graph(nodes, constants, own, (x.shape[1], x.shape[2], x.shape[3]), rows.shape[1], writer.maps)
    return graph, torch.cat([fewer, rows])


def _needed(nodes: list[Node], result: str) -> list[Node]:
    """The nodes that the result depends on, in their order."""
    wanted = {result}
    kept = list[Node]()
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]
