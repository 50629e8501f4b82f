"""How many rows a reference needs, and how one set of rows is divided between its directions and its variances."""

import math

import torch
from torch import Generator, Tensor

# Rows held out, from which thresholds can be calibrated.
MINIMUM_ROWS = 1024
# A set of rows spans as many directions as it has rows, less one. Half of the units dying leaves half of them; a
# reference that spans no more than this share of the dimensions cannot tell that from its own lack of rows.
SPANNED_SHARE = 0.75


def needed_rows(dimension: int) -> int:
    """Rows in either of the two sets of a reference, at least, for a verdict of healthy to mean anything."""
    return max(32, 1 + math.ceil(SPANNED_SHARE * dimension))


def wanted_rows(dimension: int) -> int:
    """Rows in one set for a calibrated reference, which is divided in two."""
    return needed_rows(dimension) + max(MINIMUM_ROWS, needed_rows(dimension))


def divided(rows: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows that give the directions and of those held out, at random, and each in their order.

    Halves, but that so many are held out as calibration needs, where enough are left for the directions.
    """
    enough = rows - needed_rows(dimension) >= MINIMUM_ROWS
    held = max(rows // 2, MINIMUM_ROWS) if enough else rows // 2
    order = torch.randperm(rows, generator=Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def shortfall(basis_rows: int, held_out_rows: int, dimension: int) -> str:
    """In words, what a reference of so many rows cannot tell; empty where they suffice. 0 basis rows: not known."""
    needed = needed_rows(dimension)
    fewest = held_out_rows if basis_rows == 0 else min(basis_rows, held_out_rows)
    if fewest >= needed:
        return ""
    return (
        f"the reference was measured on {basis_rows or 'unknown'} and {held_out_rows} rows of {dimension} dimensions, "
        f"too few to tell an intact encoder from one half of whose units died: each part needs {needed}, or one set "
        f"that is divided {wanted_rows(dimension)}"
    )
