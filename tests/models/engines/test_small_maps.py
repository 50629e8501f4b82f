"""Convolutions over maps of a few pixels as matrix products: the same rows, where the matrix is not too large."""

from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import Tensor, nn

from models.backbones.resnet import ResNet
from models.engines import at_rest
from models.engines.onnx_engine import OnnxEngine
from models.engines.small_maps import FEW, MOST_GROWTH, with_products
from models.engines.trace import Graph, trace

SCALE, OFFSET = torch.full((1, 3, 1, 1), 1 / 64), torch.full((1, 3, 1, 1), -2.0)


def pixels(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def graph_of(encoder: nn.Module, size: int) -> Graph:
    return trace(at_rest(encoder), pixels(3, size), SCALE, OFFSET)[0]


def kinds(graph: Graph) -> list[list[str]]:
    """The convolutions and products for few images, and those for many."""
    read = onnx.load_from_string(graph.serialized("x")).graph
    common = [node.op_type for node in read.node]
    parts = [part for node in read.node if node.op_type == "If" for part in node.attribute]
    branches = [[node.op_type for node in part.g.node] for part in parts] or [[], []]
    return [[it for it in common + branch if it in ("Conv", "Gemm")] for branch in branches]


class One(nn.Module):
    """Images of `size` pixels a side -> rows of one convolution."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 6, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).relu().flatten(1)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (2, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": 3, "padding": 1, "bias": False}),
        (2, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (2, {"kernel_size": 2}),
        (1, {"kernel_size": 3, "padding": 1}),
        (1, {"kernel_size": 1}),
        (2, {"kernel_size": (3, 2), "padding": (1, 1), "stride": (2, 1)}),
        (3, {"kernel_size": 3}),
        (2, {"kernel_size": 3, "padding": 2, "dilation": 2}),
        (3, {"kernel_size": 7, "padding": 3}),
    ],
)
def test_a_rewritten_convolution_is_the_convolution(size: int, how: dict[str, Any]) -> None:
    encoder = One(**how)
    rewritten = with_products(graph_of(encoder, size))
    assert kinds(rewritten) == [["Conv"], ["Gemm"]]
    (matrix,) = (tensor for tensor in rewritten.weights.values() if tensor.ndim == 2)
    assert matrix.numel() <= MOST_GROWTH * encoder.convolution.weight.numel()
    engine = OnnxEngine(rewritten.serialized("x"), rewritten.weights, 1)
    given = pixels(5, size)
    with torch.no_grad():
        expected = encoder.double()(given.double() * SCALE + OFFSET)
    for count in (1, FEW, FEW + 1, 5):
        np.testing.assert_allclose(engine(given[:count].numpy()), expected[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (3, {"kernel_size": 3, "padding": 1}),
        (4, {"kernel_size": 3, "padding": 1, "stride": 2}),
        (2, {"kernel_size": 1}),
        (2, {"kernel_size": 3, "padding": 1, "groups": 3}),
    ],
)
def test_a_convolution_whose_matrix_would_be_large_stays(size: int, how: dict[str, Any]) -> None:
    graph = graph_of(One(**how), size)
    assert with_products(graph) is graph


def test_a_resnet_of_64_pixels_changes_its_last_stage_alone() -> None:
    torch.manual_seed(0)
    encoder = ResNet("resnet18", width=4).eval()
    graph = graph_of(encoder, 64)
    rewritten = with_products(graph)
    few, many = kinds(rewritten)
    assert few == ["Conv"] * 20
    # Three of the last stage's four 3 x 3 convolutions; the first comes from maps of 4 x 4 pixels.
    assert sorted(many) == ["Conv"] * 17 + ["Gemm"] * 3
    engine = OnnxEngine(rewritten.serialized("x"), rewritten.weights, 1)
    for count in (1, FEW, FEW + 1, 9):
        given = pixels(count, 64)
        with torch.no_grad():
            expected = encoder(given * SCALE + OFFSET)
        np.testing.assert_allclose(engine(given.numpy()), expected, rtol=1e-3, atol=1e-5)
    larger = graph_of(encoder, 96)  # its last maps have 3 x 3 pixels
    assert with_products(larger) is larger


def test_a_graph_with_branches_is_valid_onnx_and_the_reference_evaluator_agrees() -> None:
    torch.manual_seed(0)
    encoder = ResNet("resnet18", width=4, stem="3x3").eval()
    rewritten = with_products(graph_of(encoder, 16))
    assert kinds(rewritten)[1].count("Gemm") == 3
    whole = onnx.load_from_string(rewritten.serialized("x"))
    for tensor in whole.graph.initializer:
        if tensor.external_data:
            tensor.CopyFrom(onnx.numpy_helper.from_array(rewritten.weights[tensor.name].detach().numpy(), tensor.name))
    onnx.checker.check_model(whole, full_check=True)
    for count in (FEW, FEW + 1):
        given = pixels(count, 16)
        (rows,) = onnx.reference.ReferenceEvaluator(whole).run(None, {"pixels": given.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(rows, encoder(given * SCALE + OFFSET), rtol=1e-4, atol=1e-5)
