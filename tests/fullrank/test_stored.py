"""Files and answers of the safetensors format that hold what nothing can be calculated with, or are none."""

import json

import pytest
import torch
from safetensors.torch import load, save

from fullrank import Reference
from fullrank.calibration.resample import calibrated
from fullrank.moments import Moments
from fullrank.stored import tensors_in

STORED_ONLY = (torch.float8_e4m3fn, torch.complex64, torch.uint16)


def rows_of(n: int, seed: int = 0, d: int = 16) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    built = Reference.build(rows_of(1024), rows_of(1024, 1), canary=rows_of(40, 2), calibrate=False)
    return calibrated(built, rows_of(1024, 1), None, rows_of(1024, 3, 8), windows=2, blocks=4).tensors()


def a_file(kind: str) -> bytes:
    header = json.dumps({"rows": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def test_what_was_saved_is_read() -> None:
    read = tensors_in(save({"a": torch.arange(3), "b": torch.ones(2, 2)}))
    assert read["a"].tolist() == [0, 1, 2]
    assert read["b"].shape == (2, 2)


@pytest.mark.parametrize("data", [b"", b"hello, world, no tensors", a_file("U8")[:-1], a_file("Q9")])
def test_bytes_that_are_no_file_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensors_in(data)


def test_a_type_that_torch_lacks_is_named() -> None:
    with pytest.raises(KeyError):
        load(a_file("F8_E8M0"))  # what safetensors itself says
    with pytest.raises(ValueError, match="F8_E8M0"):
        tensors_in(a_file("F8_E8M0"))


@pytest.mark.parametrize("dtype", STORED_ONLY, ids=str)
def test_a_reference_names_the_tensor_of_a_type_without_arithmetic(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    Reference.from_tensors(dict(tensors))
    for name, tensor in tensors.items():
        odd = torch.zeros(tensor.shape, dtype=dtype)
        with pytest.raises(ValueError, match=f"reference: tensor '{name}' is of {dtype}"):
            Reference.from_tensors(tensors | {name: odd})


def test_no_shape_of_any_tensor_ends_in_another_error(tensors: dict[str, torch.Tensor]) -> None:
    refused = 0
    for name, tensor in tensors.items():
        shapes = (tensor.flatten()[:0], tensor.flatten()[0], torch.stack((tensor, tensor)), tensor[:-1])
        for damaged in shapes:
            try:
                Reference.from_tensors(tensors | {name: damaged})
            except ValueError:
                refused += 1
    assert refused > 3 * len(tensors)


@pytest.mark.parametrize("dtype", STORED_ONLY, ids=str)
def test_moments_name_the_tensor_of_a_type_without_arithmetic(dtype: torch.dtype) -> None:
    good = Moments(4).add(rows_of(50, d=4)).tensors()
    for name, tensor in good.items():
        with pytest.raises(ValueError, match=f"moments: tensor '{name}' is of {dtype}"):
            Moments.from_tensors(good | {name: torch.zeros(tensor.shape, dtype=dtype)})
