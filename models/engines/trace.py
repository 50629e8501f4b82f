"""From an encoder in PyTorch to the same function as an ONNX graph, by watching two passes of it.

Every operation that PyTorch dispatches is recorded and looked up in `operators`. Two batches of different sizes go
through, so that the dimensions which follow the batch are known from the others. Nothing of the encoder's source is
looked at: what it does is what counts. A graph is then compared with the passes it was recorded from (`parity`).
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


class UnsupportedError(ValueError):
    """An operation that has no counterpart here; the message names it."""


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Attribute]


@dataclass(frozen=True)
class Graph:
    """Nodes from `pixels` (n, c, h, w) uint8 to `rows` (n, d) float32, weights by their names in the state dict."""

    nodes: list[Node]
    constants: dict[str, NDArray[Any]]
    weights: dict[str, Tensor]
    shape: tuple[int, int, int]
    dimension: int

    def serialized(self, location: str, offsets: dict[str, int] | None = None) -> bytes:
        """The ONNX file. Weights begin at these bytes of file `location`, beside it; all at 0 to be filled in later."""
        nodes = [protobuf.node(it.operator, it.inputs, it.outputs, it.attributes) for it in self.nodes]
        tensors = [protobuf.constant(name, values) for name, values in self.constants.items()]
        for name, tensor in self.weights.items():
            tensors.append(protobuf.external(name, tensor.shape, location, offsets[name] if offsets else 0))
        given, result = (PIXELS, ("n", *self.shape)), (ROWS, ("n", self.dimension))
        return protobuf.model(nodes, tensors, given, result, PRODUCER)


class Writer:
    """The graph while it grows: what `operators` write to."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self._names: dict[int, str] = {}  # of tensors, by identity
        self._weights = {id(tensor): name for name, tensor in weights.items()}
        self._stores = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
        self._moving: set[int] = set()  # those that differ from input to input, or with the size of the batch
        self._alive: list[Tensor] = []  # so that no identity is given twice
        self.shape: list[int] = []  # of the result now being written; -1 where it follows the batch

    def node(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Attribute) -> Any:
        """Add a node; the name of its output, or the names if there are several."""
        names = [f"{operator.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(Node(operator, inputs, names, attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any) -> str:
        """The name of values that the graph itself holds: int64 for whole numbers, else float32."""
        array = np.asarray(values)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = array
        return name

    def value(self, operand: Any) -> str:
        """The name of a tensor or a number that an operation takes."""
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
        """The shape of the result being written, as Reshape takes it."""
        if self.shape.count(-1) > 1:
            raise UnsupportedError(f"a shape {self.shape} that follows the batch twice")
        return self.constant(np.array(self.shape, np.int64))

    def expand(self, x: str) -> str:
        """x repeated to the shape of the result being written."""
        if -1 not in self.shape:
            return str(self.node("Expand", x, self.sizes()))
        batch = self.node("Shape", PIXELS, start=0, end=1)
        parts = [batch if size == -1 else self.constant(np.array([size])) for size in self.shape]
        return str(self.node("Expand", x, self.node("Concat", *parts, axis=0)))

    def bind(self, tensor: Tensor, name: str, *, moves: bool = True) -> None:
        """Call a tensor so from now on. moves: it depends on the input or on the size of the batch."""
        self._names[id(tensor)] = name
        self._alive.append(tensor)
        if moves:
            self._moving.add(id(tensor))

    def moves(self, tensor: Tensor) -> bool:
        return id(tensor) in self._moving

    def is_weight(self, tensor: Tensor) -> bool:
        """Is it a weight or a view of one, which the graph must not hold a second time?"""
        return tensor.untyped_storage().data_ptr() in self._stores


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to skip it, PyTorch would import its whole compiler, seconds and 150 MB."""
        return False


class _Shapes(_Watch):  # type: ignore[no-untyped-call]
    """The shapes of every operation's results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[list[torch.Size]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.shapes.append([tensor.shape for tensor in _tensors(result)])
        return result


class _Recorder(_Watch):  # type: ignore[no-untyped-call]
    """Writes each operation down as it happens."""

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
            return result  # a constant, which the graph holds if anything that moves takes it
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
    """The graph of encoder(pixels * scale + offset), and its rows for `pixels` (m, c, h, w) uint8, m at least 3.

    One image goes first, then the others. The encoder is a float32 one in eval mode on the CPU; scale and offset are
    (1, c, 1, 1). UnsupportedError when it does something that `operators` does not know.
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
    graph = Graph(nodes, constants, own, (x.shape[1], x.shape[2], x.shape[3]), rows.shape[1])
    return graph, torch.cat([fewer, rows])


def _needed(nodes: list[Node], result: str) -> list[Node]:
    """Those that the result depends on, in their order."""
    wanted = {result}
    kept = list[Node]()
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]
