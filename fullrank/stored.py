"""Tensors that were stored or sent: what is read is what can be calculated with, or is refused by name."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

# torch has types to store numbers in, of 8 bits and fewer, in which it can neither add nor compare.
_PLAIN = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_PLAIN |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ValueError for bytes that are none, and for types that this torch lacks."""
    try:
        return load(data)
    except KeyError as error:
        raise ValueError(f"a safetensors file with a tensor of {error.args[0]}, a type that torch lacks") from error
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from error


def check_plain(tensors: Mapping[str, Tensor], what: str) -> None:
    """ValueError that begins with `what` and names one which holds neither integers nor floats of 16 bits or more."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _PLAIN:
            raise ValueError(f"{what} {name!r} is of {tensor.dtype}, with which nothing can be calculated; use float32")
