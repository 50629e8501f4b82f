"""Rows as they come in: tensors or arrays of any float dtype on any device, checked once."""

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | list[float] | list[list[float]]


# Norms whose squares float64 holds to its full precision.
_LEAST_NORM, _LARGEST_NORM = 1e-140, 1e140


class _Unlocked:
    """The memory of a read-only array, as one that may be written: nothing here does, and torch warns of the other."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def as_tensor(values: ArrayLike, name: str) -> Tensor:
    """values as a tensor on their device, which shares their memory where torch can read it.

    Of numpy arrays any strides, either byte order and read-only ones will do; longdouble becomes float64. Raises
    ValueError that names the input where the values are no numbers.
    """
    given: Tensor | np.ndarray | list[float] | list[list[float]] = values
    if isinstance(given, np.ndarray):
        if given.dtype == np.longdouble:
            given = given.astype(np.float64)
        if not given.dtype.isnative or any(stride < 0 for stride in given.strides):
            given = given.astype(given.dtype.newbyteorder("="), order="C")
        if not given.flags.writeable:
            given = np.asarray(_Unlocked(given))
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array of floats: {error}") from error


def as_rows(
    rows: ArrayLike, dimension: int | None = None, *, name: str = "rows", dtype: torch.dtype | None = None
) -> Tensor:
    """rows as a detached CPU tensor (n, dimension); float64 stays, any other float becomes float32 unless dtype says
    so.

    Raises ValueError that names the input when it is not two-dimensional, not floating or of another width.
    """
    tensor = as_tensor(rows, name).detach()
    check_rows(tensor, dimension, name)
    return tensor.to("cpu", dtype or (torch.float64 if tensor.dtype == torch.float64 else torch.float32))


def check_rows(tensor: Tensor, dimension: int | None, name: str) -> None:
    """Raises ValueError unless the tensor is (n, dimension) and floating. A dimension of None means any but 0."""
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions (n, d), got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {str(tensor.dtype).removeprefix('torch.')}")
    if dimension is not None and tensor.shape[1] != dimension:
        raise ValueError(f"{name}: expected width {dimension}, got {tensor.shape[1]}")
    if not tensor.shape[1]:
        raise ValueError(f"{name}: expected at least one column, got shape {tuple(tensor.shape)}")


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1 in their own dtype; rows of zeros stay zero."""
    # In float64 neither the square of 1e-30 nor that of 1e30 is lost; those of 1e-200 and 1e200 are.
    wide = rows.to(torch.float64)
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if rows.dtype == torch.float64 and not bool(((norms > _LEAST_NORM) & (norms < _LARGEST_NORM)).all()):
        largest = wide.abs().amax(1, keepdim=True)
        wide = wide / torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide / torch.where(norms > 0, norms, 1.0)).to(rows.dtype)
