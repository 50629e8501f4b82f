"""Translates PyTorch's operations to ONNX nodes (operator set 20), with one short function for each operation.

A function takes the operation's arguments, and raises UnsupportedError for what ONNX cannot express. The result's shape
is `w.shape`, with -1 for the dimension of the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.engines.trace import UnsupportedError, Writer

OPERATORS: dict[str, Callable[..., str | list[str]]] = {}
Sizes = int | Sequence[int]


def named(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function for these operations, and for their in-place forms."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


def _pair(value: Sizes) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _only(expected: object, given: object, what: str) -> None:
    if given != expected:
        raise UnsupportedError(f"{what} {given}")


# ---- convolution, pooling, normalisation


@named("conv2d")
def conv2d(
    w: Writer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str):
        raise UnsupportedError(f"a convolution with padding {padding!r}")
    inputs = [w.value(x), w.value(weight), *([] if bias is None else [w.value(bias)])]
    shape: dict[str, Any] = {"strides": _pair(stride), "pads": _pair(padding) * 2, "dilations": _pair(dilation)}
    return w.node("Conv", *inputs, group=groups, **shape)


@named("batch_norm")
def batch_norm(
    w: Writer,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Any:
    if training or mean is None or variance is None:
        raise UnsupportedError("a batch norm without running statistics: a row would depend on its batch")
    scale = w.constant(np.ones(len(mean))) if weight is None else w.value(weight)
    shift = w.constant(np.zeros(len(mean))) if bias is None else w.value(bias)
    return w.node("BatchNormalization", w.value(x), scale, shift, w.value(mean), w.value(variance), epsilon=eps)


@named("max_pool2d")
def max_pool2d(
    w: Writer,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil: bool = False,
) -> Any:
    strides = _pair(stride or kernel)
    shape: dict[str, Any] = {"kernel_shape": _pair(kernel), "strides": strides, "pads": _pair(padding) * 2}
    return w.node("MaxPool", w.value(x), ceil_mode=int(ceil), dilations=_pair(dilation), **shape)


@named("avg_pool2d")
def avg_pool2d(
    w: Writer,
    x: Tensor,
    kernel: Sizes,
    stride: Sizes = (),
    padding: Sizes = 0,
    ceil: bool = False,
    padded: bool = True,
    divisor: int | None = None,
) -> Any:
    _only(None, divisor, "an average pool with divisor")
    _only(False, ceil, "an average pool with ceil_mode")
    shape: dict[str, Any] = {
        "kernel_shape": _pair(kernel),
        "strides": _pair(stride or kernel),
        "pads": _pair(padding) * 2,
    }
    return w.node("AveragePool", w.value(x), count_include_pad=int(padded), **shape)


@named("adaptive_avg_pool2d")
def adaptive_avg_pool2d(w: Writer, x: Tensor, size: Sizes) -> Any:
    _only([1, 1], _pair(size), "an adaptive pool to")
    return w.node("GlobalAveragePool", w.value(x))


@named("layer_norm")
def layer_norm(
    w: Writer,
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Any:
    scale = w.constant(np.ones(shape)) if weight is None else w.value(weight)
    shift = [] if bias is None else [w.value(bias)]
    return w.node("LayerNormalization", w.value(x), scale, *shift, axis=-len(shape), epsilon=eps)


@named("constant_pad_nd")
def constant_pad_nd(w: Writer, x: Tensor, padding: Sequence[int], value: float = 0.0) -> Any:
    pairs = [(0, 0)] * (x.ndim - len(padding) // 2)
    pairs += [(padding[i], padding[i + 1]) for i in range(len(padding) - 2, -1, -2)]  # PyTorch's begin at the last
    sizes = [before for before, _ in pairs] + [after for _, after in pairs]
    return w.node("Pad", w.value(x), w.constant(np.array(sizes)), w.constant(float(value)))


@named("pad")
def pad(w: Writer, x: Tensor, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    _only("constant", mode, "padding in mode")
    return constant_pad_nd(w, x, padding, value or 0.0)


# ---- products


@named("linear")
def linear(w: Writer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if x.ndim == 2:
        return w.node("Gemm", w.value(x), w.value(weight), *([] if bias is None else [w.value(bias)]), transB=1)
    product = w.node("MatMul", w.value(x), w.node("Transpose", w.value(weight), perm=[1, 0]))
    return product if bias is None else w.node("Add", product, w.value(bias))


@named("matmul", "mm", "bmm")
def matmul(w: Writer, a: Tensor, b: Tensor) -> Any:
    return w.node("MatMul", w.value(a), w.value(b))


@named("addmm")
def addmm(w: Writer, bias: Tensor, a: Tensor, b: Tensor) -> Any:
    return w.node("Gemm", w.value(a), w.value(b), w.value(bias))


@named("scaled_dot_product_attention")
def attention(
    w: Writer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if mask is not None or causal or enable_gqa:
        raise UnsupportedError("attention with a mask or groups")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    axes = list(range(key.ndim))
    turned = w.node("Transpose", w.value(key), perm=[*axes[:-2], axes[-1], axes[-2]])
    scores = w.node("MatMul", w.node("Mul", w.value(query), w.constant(factor)), turned)
    return w.node("MatMul", w.node("Softmax", scores, axis=-1), w.value(value))


# ---- arithmetic


def _binary(operator: str) -> Callable[..., Any]:
    def write(w: Writer, a: Any, b: Any, *, alpha: float = 1) -> Any:
        _only(1, alpha, f"{operator} with alpha")
        return w.node(operator, w.value(a), w.value(b))

    return write


for _name, _operator in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow"}.items():
    OPERATORS[_name] = _binary(_operator)


def _unary(operator: str) -> Callable[..., Any]:
    return lambda w, x: w.node(operator, w.value(x))


for _name, _operator in {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "hardswish": "HardSwish",
}.items():
    OPERATORS[_name] = _unary(_operator)


@named("rsqrt")
def rsqrt(w: Writer, x: Tensor) -> Any:
    return w.node("Reciprocal", w.node("Sqrt", w.value(x)))


@named("silu")
def silu(w: Writer, x: Tensor) -> Any:
    return w.node("Mul", w.value(x), w.node("Sigmoid", w.value(x)))


@named("gelu")
def gelu(w: Writer, x: Tensor, *, approximate: str = "none") -> Any:
    return w.node("Gelu", w.value(x), approximate=approximate)


@named("softmax")
def softmax(w: Writer, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return w.node("Softmax", w.value(x), axis=dim)


@named("clamp_min")
def clamp_min(w: Writer, x: Tensor, least: float) -> Any:
    return w.node("Max", w.value(x), w.constant(float(least)))


@named("clamp", "hardtanh")
def clamp(w: Writer, x: Tensor, least: float | None = None, most: float | None = None) -> Any:
    name = w.value(x)
    name = name if least is None else w.node("Max", name, w.constant(float(least)))
    return name if most is None else w.node("Min", name, w.constant(float(most)))


@named("relu6")
def relu6(w: Writer, x: Tensor) -> Any:
    return clamp(w, x, 0, 6)


@named("mean")
def mean(
    w: Writer, x: Tensor, dims: Sizes, keep: bool = False, *, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Any:
    axes = [dims] if isinstance(dims, int) else list(dims)
    return w.node("ReduceMean", w.value(x), w.constant(np.array(axes, np.int64)), keepdims=int(keep or keepdim))


# ---- shapes


@named("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
def reshape(w: Writer, x: Tensor, *sizes: Any, **more: Any) -> Any:
    return w.node("Reshape", w.value(x), w.sizes())


@named("expand")
def expand(w: Writer, x: Tensor, sizes: Sequence[int], *, implicit: bool = False) -> Any:
    return w.expand(w.value(x))


@named("permute")
def permute(w: Writer, x: Tensor, axes: Sequence[int]) -> Any:
    return w.node("Transpose", w.value(x), perm=[axis % x.ndim for axis in axes])


@named("transpose")
def transpose(w: Writer, x: Tensor, first: int, second: int) -> Any:
    axes = list(range(x.ndim))
    axes[first], axes[second] = axes[second], axes[first]
    return w.node("Transpose", w.value(x), perm=axes)


@named("t")
def t(w: Writer, x: Tensor) -> Any:
    return transpose(w, x, 0, 1)


@named("cat")
def cat(w: Writer, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    return w.node("Concat", *(w.value(tensor) for tensor in tensors), axis=dim)


@named("select")
def select(w: Writer, x: Tensor, dim: int, index: int) -> Any:
    return w.node("Gather", w.value(x), w.constant(index), axis=dim)


@named("slice")
def slice_(w: Writer, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    last = min(end if end is not None else x.shape[dim], 2**31 - 1)
    bounds = [np.array([it], np.int64) for it in (start or 0, last, dim, step)]
    return w.node("Slice", w.value(x), *map(w.constant, bounds))


@named("unbind")
def unbind(w: Writer, x: Tensor, dim: int = 0) -> Any:
    return [w.node("Gather", w.value(x), w.constant(index), axis=dim) for index in range(x.shape[dim])]


@named("split", "split_with_sizes")
def split(w: Writer, x: Tensor, size: Sizes, dim: int = 0) -> Any:
    total = x.shape[dim]
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    return w.node("Split", w.value(x), w.constant(np.array(sizes, np.int64)), outputs=len(sizes), axis=dim)


@named("chunk")
def chunk(w: Writer, x: Tensor, chunks: int, dim: int = 0) -> Any:
    return split(w, x, math.ceil(x.shape[dim] / chunks), dim)


@named("clone", "contiguous", "detach", "dropout", "alias", "lift_fresh", "identity")
def same(w: Writer, x: Tensor, *settings: Any, **more: Any) -> Any:
    return w.value(x)


@named("to", "_to_copy", "float")
def cast(w: Writer, x: Tensor, *settings: Any, dtype: torch.dtype | None = None, **more: Any) -> Any:
    wanted = [dtype, *(it for it in settings if isinstance(it, torch.dtype))]
    if any(it not in (None, torch.float32) for it in wanted) or x.dtype != torch.float32:
        raise UnsupportedError(f"a conversion from {x.dtype} to {wanted}")
    return w.value(x)
