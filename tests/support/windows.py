"""The statistics of one window from its rows alone: what the calibration's many windows at once are held against."""

import math

import torch
from torch import Tensor

from fullrank import Reference, measures, profile
from fullrank.calibration.ranges import BLOCK_ROWS
from fullrank.calibration.windows import columns, log_ratio, tail_shift
from fullrank.moments import Moments, Traces


def window_statistics(reference: Reference, rows: Tensor, inputs: Tensor | None) -> Tensor:
    """The statistics of a `Calibration`'s columns for a window of unit rows (n, d) and their descriptors (n, k)."""
    x = rows.double()
    n = len(x)
    blocks = [block for block in torch.split(x, BLOCK_ROWS) if len(block) > 1]
    energies = sum(profile.energies_of_rows(profile.centred(block), reference.basis) for block in blocks)
    assert isinstance(energies, Tensor)
    energies = energies / n
    mean = torch.cat(blocks).mean(0)
    y = x - mean
    squares = y.square().sum(1)
    covariance = y.T @ y / (n - 1)
    frobenius = float(covariance.square().sum())
    traces = Traces(
        n, reference.dimension, float(squares.sum()) / (n - 1), frobenius, float(squares.square().sum()) / (n - 1)
    )
    eigenvalues = measures.spectrum(covariance)
    rank = measures.numerical_rank(eigenvalues, reference.noise_floor)
    spanned = n > reference.numerical_rank
    named = {
        "participation_ratio": log_ratio(traces.participation_ratio / reference.participation_ratio),
        "effective_rank": log_ratio(traces.effective_rank(eigenvalues) / reference.effective_rank),
        "numerical_rank": rank / reference.numerical_rank if spanned else math.nan,
        "tail_shift": tail_shift(reference, (mean - reference.mean) @ reference.basis, energies, n, reference.rows),
    }
    if inputs is not None and reference.inputs is not None:
        read = reference.inputs.read(Moments(inputs.shape[1]).add(reference.inputs.bounded(inputs)))
        named |= {"input_distance": read.distance, "texture_shift": read.texture_shift}
    return columns(reference, energies, mean, n, named)
