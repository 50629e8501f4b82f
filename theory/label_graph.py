"""The graph of samples and labels behind the frustration lab: who carries which label, and how fast it contracts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from theory.toys import F64, normal, orthogonal


def assignment(samples: int, classes: int, fraction: float, kind: Literal["pair", "all"]) -> Tensor:
    """A (N, C): sample i has label i mod C; of each class the first `fraction` share a second label, or all."""
    a = torch.zeros(samples, classes, dtype=F64)
    labels = torch.arange(samples) % classes
    a[torch.arange(samples), labels] = 1
    for i in range(round(fraction * samples)):
        if kind == "all":
            a[i] = 1 / classes
        else:
            other = (int(labels[i]) + 1 + (i // classes) % (classes - 1)) % classes
            a[i] = 0
            a[i, labels[i]] = a[i, other] = 0.5
    return a


def spectrum(a: Tensor) -> Tensor:
    """Eigenvalues ν of BA, descending: those of the symmetric n^(-1/2) AᵀA n^(-1/2)."""
    root = a.sum(0).rsqrt()
    values: Tensor = torch.linalg.eigvalsh(root[:, None] * (a.T @ a) * root)
    return values.flip(0)


def other_modes(a: Tensor, time: float) -> float:
    """What faster modes are beside the slowest ones in a difference of two labels at `time`, for the worst pair.

    Two labels may have the same place in the slowest mode. Their distance, the smallest of all, then contracts faster.
    """
    root = a.sum(0).rsqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * (a.T @ a) * root)
    rates = (1 - values.clamp(0, 1).sqrt()).flip(0)[1:]
    places = (root[:, None] * vectors).flip(1)[:, 1:]  # of the labels, in each mode but the common mean
    first, second = torch.triu_indices(len(places), len(places), 1)
    parts = (places[first] - places[second]).square() * torch.exp(-2 * (rates - rates[0]) * time)
    slow = rates < 1.1 * rates[0]
    return float((parts[:, ~slow].sum(1) / parts[:, slow].sum(1)).max().sqrt())


def class_means(a: Tensor, x: Tensor) -> Tensor:
    """(C, d): the means of the samples that carry one label only."""
    sure = (a > 0.99).to(F64)
    sure = sure if bool((sure.sum(0) > 0).all()) else a
    return (sure.T @ x) / sure.sum(0)[:, None]


def separation(a: Tensor, x: Tensor) -> float:
    """Smallest distance between two class means."""
    return float(torch.pdist(class_means(a, x)).min())


def teacher_inputs(a: Tensor, generator: torch.Generator) -> Tensor:
    """ξ (N, p), p at least 64: three times the teacher's class direction, half-way between two for frustrated samples.

    Plus noise in the directions of no class.
    """
    samples, classes = a.shape
    p = max(64, 2 * classes)
    basis = orthogonal(generator, p)
    noise = 0.5 * normal(generator, samples, p - classes)
    return 3 * a @ basis[:classes] + noise @ basis[classes:]


def student_rate(a: Tensor, inputs: Tensor) -> float:
    """The slowest rate at which the plain linear student contracts, but for the common mean, which stays.

    U̇ = −(UCᵀ − YᵀAᵀξ/N) and ẏ = −(y − BξUᵀ) with C = ξᵀξ/N: a flow whose matrix, with the labels weighted by √n_c/N, is
    symmetric and positive semi-definite. Inputs that hardly vary in some direction contract slowly there.
    """
    n, root = len(inputs), a.sum(0).sqrt()
    mixed = -inputs.T @ a / (root * n**0.5)
    top = torch.cat([inputs.T @ inputs / n, mixed], 1)
    matrix = torch.cat([top, torch.cat([mixed.T, torch.eye(len(root), dtype=F64)], 1)])
    values = torch.linalg.eigvalsh(matrix)
    # The mean, and directions in which the inputs, fewer than dimensions, do not vary at all: nothing moves there.
    return float(values[values > 1e-9][0])


def twin_head(rate: float, time: float) -> float:
    """What is left of an output Wx at most, if a twin head learns along with a mode that contracts at `rate`.

    With u = w² of the head along the mode and v = α_pF of the mode, u̇ = v̇ = −2 rate uv: c = u − v stays, and from u = 1
    the output falls like 1/(2 rate t sinh(s)/s + e^(−s)), s = rate c t, which is below 1/(2 rate t) for any c.
    Nothing falls where nothing contracts: 1 is left.
    """
    return 1 / max(1.0, 2 * rate * time)
