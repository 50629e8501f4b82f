"""Traced graphs: the same function as PyTorch's, for any batch, and valid ONNX by the onnx package's own checker."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import Name, ResNet
from models.card import ViTArchitecture
from models.engines.onnx_engine import OnnxEngine
from models.engines.trace import Graph, UnsupportedError, trace

SCALE, OFFSET = torch.full((1, 3, 1, 1), 1 / 64), torch.full((1, 3, 1, 1), -2.0)


def pixels(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def run(graph: Graph, images: Tensor) -> np.ndarray:
    return OnnxEngine(graph.serialized("elsewhere"), graph.weights, 1)(images.numpy())


class Lambda(nn.Module):
    """(n, 3, 16, 16) -> features (n, 8, 4, 4) of a convolution -> what `function` makes of them."""

    def __init__(self, function: Callable[["Lambda", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.function = nn.Conv2d(3, 8, 4, stride=4), function
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.norm, self.linear, self.wide = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.batch_norm = nn.BatchNorm2d(8)
        nn.init.normal_(self.batch_norm.running_mean)
        nn.init.uniform_(self.batch_norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.convolution(x))


def tokens(m: Lambda, x: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions


def attended(m: Lambda, x: Tensor) -> Tensor:
    x = tokens(m, x)
    query, key, value = m.wide(m.norm(x)).reshape(len(x), 17, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(len(x), 17, 8)
    return (x + m.linear(y))[:, 0]


def by_hand(m: Lambda, x: Tensor) -> Tensor:
    x = tokens(m, x)
    query, key, value = m.wide(x).chunk(3, dim=-1)
    return (torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(8), dim=-1) @ value)[:, 1:].mean(1)


def resized_positions(m: Lambda, x: Tensor) -> Tensor:
    grid = m.positions[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return (F.avg_pool2d(x, 2).flatten(2).transpose(1, 2) + grid).mean(1)


FORMS: dict[str, Callable[[Lambda, Tensor], Tensor]] = {
    "class token": lambda m, x: m.norm(tokens(m, x))[:, 0],
    "attention": attended,
    "attention by hand": by_hand,
    "constants computed from weights": resized_positions,
    "batch norm and pool": lambda m, x: F.adaptive_avg_pool2d(F.relu(m.batch_norm(x)), 1).flatten(1),
    "max pool": lambda m, x: F.max_pool2d(x, 3, stride=2, padding=1).flatten(1),
    "generalised mean": lambda m, x: x.clamp(min=1e-3).pow(3).mean((-2, -1)).pow(1 / 3),
    "activations": lambda m, x: (F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) - x.sigmoid()).mean((2, 3)),
    "quick gelu": lambda m, x: (x * torch.sigmoid(1.702 * x)).mean((2, 3)),
    "hard swish": lambda m, x: (F.hardswish(x) + F.relu6(x) + torch.tanh(x)).mean((2, 3)),
    "gated": lambda m, x: torch.mul(*m.wide(x.mean((2, 3))).split([12, 12], 1)),
    "asymmetric padding": lambda m, x: F.pad(x, (1, 0, 0, 2), value=0.5).mean((2, 3)),
    "in place": lambda m, x: x.mul(2).add_(1).relu_().div_(3).mean((2, 3)),
    "two parts": lambda m, x: torch.cat([x[:, :, 0].mean(2), x[:, ::2, 1:3, -1].flatten(1)], 1),
    "unit rows": lambda m, x: x.mean((2, 3)) * (x.mean((2, 3)).pow(2).mean(1, keepdim=True) + 1e-6).rsqrt(),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_operation_is_what_pytorch_makes_of_it(form: str) -> None:
    encoder = Lambda(FORMS[form]).eval()
    graph, rows = trace(encoder, pixels(3), SCALE, OFFSET)
    other = pixels(5, seed=1)
    with torch.no_grad():
        expected = encoder(other * SCALE + OFFSET)
        np.testing.assert_allclose(rows, encoder(pixels(3) * SCALE + OFFSET), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(run(graph, other), expected, rtol=1e-4, atol=1e-5)
    assert graph.dimension == expected.shape[1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["7x7", "3x3"])
def test_a_resnet_is_valid_onnx_and_the_reference_evaluator_agrees(name: Name, stem: str) -> None:
    torch.manual_seed(0)
    encoder = ResNet(name, width=4, stem=stem).eval()
    graph, _ = trace(encoder, pixels(3), SCALE, OFFSET)
    whole = onnx.load_from_string(graph.serialized("encoder.safetensors"))
    assert {tensor.external_data[0].value for tensor in whole.graph.initializer if tensor.external_data} == {
        "encoder.safetensors"
    }
    for tensor in whole.graph.initializer:
        if tensor.external_data:
            assert int(tensor.external_data[2].value) == graph.weights[tensor.name].numel() * 4
            tensor.CopyFrom(onnx.numpy_helper.from_array(graph.weights[tensor.name].detach().numpy(), tensor.name))
    onnx.checker.check_model(whole, full_check=True)
    assert [it.dim_param or it.dim_value for it in whole.graph.input[0].type.tensor_type.shape.dim] == ["n", 3, 16, 16]
    images = pixels(2, seed=1)
    (expected,) = onnx.reference.ReferenceEvaluator(whole).run(None, {"pixels": images.numpy()})
    np.testing.assert_allclose(run(graph, images), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(encoder(images * SCALE + OFFSET), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "class+mean", "registers": 2, "layer_scale": True, "activation": "swiglu"},
        {"pool": "mean", "class_token": False, "positions": "sincos", "final_norm": "pooled"},
        {"pool": "class", "pre_norm": True, "activation": "quick_gelu", "projection": 8, "patch_bias": False},
        {"pool": "attention", "class_token": False, "activation": "gelu_tanh"},
    ],
)
def test_every_kind_of_vision_transformer_has_a_graph(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    values = {"size": 16, "patch": 4, "width": 32, "depth": 2, "heads": 2, "hidden": 64} | changes
    encoder = ViTArchitecture(**values).build().eval()
    graph, _ = trace(encoder, pixels(3), SCALE, OFFSET)
    images = pixels(5, seed=1)
    with torch.no_grad():
        np.testing.assert_allclose(run(graph, images), encoder(images * SCALE + OFFSET), rtol=1e-4, atol=1e-5)
    rows = run(graph, images)
    for count in (1, 2, 4):
        np.testing.assert_allclose(run(graph, images[:count]), rows[:count], atol=1e-6 * np.abs(rows).max())


def test_no_weight_is_held_by_the_graph_itself() -> None:
    encoder = ResNet("resnet18", width=32).eval()
    graph, _ = trace(encoder, pixels(3), SCALE, OFFSET)
    assert len(graph.serialized("elsewhere")) < 40_000
    assert set(graph.weights) == {name for name in encoder.state_dict() if not name.endswith("num_batches_tracked")}
    assert all(tensor is encoder.state_dict(keep_vars=True)[name] for name, tensor in graph.weights.items())


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda m, x: torch.fft.rfft(x).abs().mean((2, 3)), "rfft"),
        (lambda m, x: x.cumsum(2).mean((2, 3)), "cumsum"),
        (lambda m, x: F.batch_norm(x, None, None, training=True).mean((2, 3)), "depend on its batch"),
        (lambda m, x: x.mean((2, 3)) if len(x) == 1 else x.relu().mean((2, 3)).relu(), "another course"),
        (lambda m, x: x.double().mean((2, 3)).float(), "float64"),
        (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect").mean((2, 3)), "reflect"),
    ],
)
def test_what_has_no_counterpart_is_named(function: Callable[[Lambda, Tensor], Tensor], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        trace(Lambda(function).eval(), pixels(3), SCALE, OFFSET)
