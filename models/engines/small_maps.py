"""Rewrites convolutions over maps of a few pixels as matrix products, for batches.

A convolution over a map of 2 x 2 pixels uses each weight for four pixels. onnxruntime goes through all weights once an
image, and waits for memory. A matrix product goes through them once a batch.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from models.engines import protobuf
from models.engines.trace import PIXELS, ROWS, Graph, Node

FEW = 2  # images at most for which the convolution is as fast
MOST_GROWTH = 2  # times the convolution's weights that the matrix may have


def with_products(graph: Graph) -> Graph:
    """A graph that takes such convolutions as they are for FEW images, and as matrix products for more.

    It branches before the first of them, so the session, its threads and the layers before are the same for both. Only
    rounding differs. A graph without such convolutions comes back as it is.
    """
    at = next((i for i, node in enumerate(graph.nodes) if _places(node, graph) is not None), None)
    if at is None:
        return graph
    constants = dict(graph.constants)
    weights = dict(graph.weights)
    products = list[Node]()
    for node in graph.nodes[at:]:
        places = _places(node, graph)
        products += [node] if places is None else _product(node, places, graph, constants, weights)
    branches: dict[str, protobuf.Attribute] = {
        "then_branch": _branch(graph.nodes[at:], graph.dimension, "rows_of_few"),
        "else_branch": _branch(products, graph.dimension, "rows_of_many"),
    }
    constants["few"] = np.array([FEW])
    choice = [
        Node("Shape", [PIXELS], ["count"], {"start": 0, "end": 1}),
        Node("LessOrEqual", ["count", "few"], ["is_few"], {}),
        Node("If", ["is_few"], [ROWS], branches),
    ]
    return replace(graph, nodes=[*graph.nodes[:at], *choice], constants=constants, weights=weights)


def _branch(nodes: list[Node], dimension: int, result: str) -> bytes:
    """The nodes that make the rows, with another name for these: two branches may not share one."""
    named = [replace(node, outputs=[result if it == ROWS else it for it in node.outputs]) for node in nodes]
    return protobuf.branch([node.serialized() for node in named], result, ("n", dimension))


def _places(node: Node, graph: Graph) -> NDArray[np.bool_] | None:
    """Which weight of a kernel joins which pixels, (kh, kw, h, w, out h, out w). None for what stays as it is.

    The matrix has an entry for each pair of an input and an output. So it suits small maps only: for a kernel of 3 x 3
    those of 2 x 2 pixels, where no entry is zero, and those of one.
    """
    if node.operator != "Conv" or not set(node.inputs[1:]) <= set(graph.weights):
        return None
    given = graph.maps.get(node.inputs[0])
    made = graph.maps.get(node.outputs[0])
    if given is None or made is None or node.attributes["group"] != 1:
        return None
    kernel = graph.weights[node.inputs[1]].shape[2:]
    if given[1] * given[2] * made[1] * made[2] > MOST_GROWTH * kernel[0] * kernel[1]:
        return None
    down, across = (_line(node, axis, kernel[axis], given[axis + 1], made[axis + 1]) for axis in range(2))
    places: NDArray[np.bool_] = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]
    return places


def _line(node: Node, axis: int, taps: int, inputs: int, outputs: int) -> NDArray[np.bool_]:
    """Which weight joins which input and output along one axis: (taps, inputs, outputs)."""
    stride, pad, dilation = (np.asarray(node.attributes[name])[axis] for name in ("strides", "pads", "dilations"))
    tap, given, made = np.ogrid[:taps, :inputs, :outputs]
    places: NDArray[np.bool_] = made * stride + tap * dilation - pad == given
    return places


def _product(
    node: Node,
    places: NDArray[np.bool_],
    graph: Graph,
    constants: dict[str, NDArray[np.int64]],
    weights: dict[str, Tensor],
) -> list[Node]:
    """The nodes of a convolution as a matrix product. Their constants and weights are added to those given."""
    (result,) = node.outputs
    flat, matrix, product, wide, tall, bias = (
        f"{result}_{part}" for part in ("flat", "matrix", "product", "wide", "tall", "bias")
    )
    weights[matrix] = from_numpy(_matrix(weights[node.inputs[1]].detach().numpy(), places))
    constants[wide] = np.array([-1, len(weights[matrix])])
    constants[tall] = np.array([-1, *graph.maps[result]])
    inputs = [flat, matrix]
    if len(node.inputs) == 3:
        pixels = places.shape[4] * places.shape[5]
        weights[bias] = weights[node.inputs[2]].detach().repeat_interleave(pixels)
        inputs.append(bias)
    return [
        Node("Reshape", [node.inputs[0], wide], [flat], {}),
        Node("Gemm", inputs, [product], {}),
        Node("Reshape", [product, tall], [result], {}),
    ]


def _matrix(kernel: NDArray[np.float32], places: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The matrix (c * h * w, out c * out h * out w) of a kernel (out c, c, kh, kw)."""
    out, channels = kernel.shape[:2]
    _, _, height, width, out_height, out_width = places.shape
    matrix = np.zeros((channels, height, width, out, out_height, out_width), np.float32)
    for row, column, *pixels in np.argwhere(places):
        i, j, u, v = pixels
        matrix[:, i, j, :, u, v] = kernel[:, :, row, column].T
    return matrix.reshape(channels * height * width, out * out_height * out_width)
