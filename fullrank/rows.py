"""Rows as they come in: tensors or arrays of any float dtype on any device, checked once."""

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | list[float] | list[list[float]]


def as_rows(
    rows: ArrayLike, dimension: int | None = None, *, name: str = "rows", dtype: torch.dtype | None = None
) -> Tensor:
    """rows as a detached CPU tensor (n, dimension); float64 stays, any other float becomes float32 unless dtype says
    so.

    Raises ValueError that names the input when it is not two-dimensional, not floating or of another width.
    """
    tensor = torch.as_tensor(rows).detach()
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
    # In float64 neither the square of 1e-30 nor that of 1e30 is lost.
    wide = rows.to(torch.float64)
    norms = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return (wide / torch.where(norms > 0, norms, 1.0)).to(rows.dtype)
