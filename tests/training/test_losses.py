"""Every loss against its formula as a loop in float64, and its gradient against autograd of that loop."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.methods.barlow_twins import barlow_twins, standardise
from training.methods.directclr import info_nce
from training.methods.predictive import regression
from training.methods.simclr import nt_xent
from training.methods.simsiam import negative_cosine
from training.methods.vicreg import vicreg

Loss = Callable[[Tensor, Tensor], Tensor]


def rows(n: int = 6, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def naive_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    z, n, tau = [*z1, *z2], len(z1), 0.3
    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        denominator = sum((cosine(z[i], z[k]) / tau).exp() for k in range(2 * n) if k != i)
        total = total - ((cosine(z[i], z[(i + n) % (2 * n)]) / tau).exp() / denominator).log()
    return total / (2 * n)


def naive_info_nce(z1: Tensor, z2: Tensor) -> Tensor:
    n, tau = len(z1), 0.1
    total = torch.zeros((), dtype=torch.float64)
    for a, b in ((z1, z2), (z2, z1)):
        for i in range(n):
            denominator = sum((cosine(a[i], b[k]) / tau).exp() for k in range(n))
            total = total - ((cosine(a[i], b[i]) / tau).exp() / denominator).log()
    return total / (2 * n)


def naive_regression(p: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, t, strict=True)]).mean()


def naive_negative_cosine(p: Tensor, t: Tensor) -> Tensor:
    return -torch.stack([cosine(a, b) for a, b in zip(p, t, strict=True)]).mean()


def naive_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    d = z1.shape[1]
    a, b = (
        [(z[:, i] - z[:, i].mean()) / (z[:, i].var(correction=0) + 1e-5).sqrt() for i in range(d)] for z in (z1, z2)
    )
    total = torch.zeros((), dtype=torch.float64)
    for i in range(d):
        for j in range(d):
            c = (a[i] * b[j]).mean()
            total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
    return total


def naive_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    (n, d), total = z1.shape, torch.zeros((), dtype=torch.float64)
    for a, b in zip(z1, z2, strict=True):
        total = total + 25 * (a - b).square().sum() / (n * d)
    for z in (z1, z2):
        for i in range(d):
            total = total + 25 * torch.relu(1 - (z[:, i].var() + 1e-4).sqrt()) / d / 2
            for j in range(d):
                if i != j:
                    covariance = ((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / (n - 1)
                    total = total + covariance**2 / d
    return total


@pytest.mark.parametrize(
    ("loss", "naive"),
    [
        (lambda a, b: nt_xent(a, b, 0.3), naive_nt_xent),
        (lambda a, b: info_nce(a, b, 0.1), naive_info_nce),
        (regression, naive_regression),
        (negative_cosine, naive_negative_cosine),
        (lambda a, b: barlow_twins(a, b, 0.0051), naive_barlow_twins),
        (vicreg, naive_vicreg),
    ],
    ids=["nt-xent", "info-nce", "regression", "negative-cosine", "barlow-twins", "vicreg"],
)
def test_value_and_gradient_are_the_formulas(loss: Loss, naive: Loss) -> None:
    fast, slow = ([z.requires_grad_() for z in rows()] for _ in range(2))
    value, expected = loss(*fast), naive(*slow)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


def test_floors() -> None:
    """What a perfect prediction costs differs between methods: 0 for BYOL, -1 for SimSiam."""
    p, _ = rows()
    assert regression(p, 3 * p).item() == pytest.approx(0, abs=1e-12)
    assert negative_cosine(p, 3 * p).item() == pytest.approx(-1, abs=1e-12)


def test_barlow_twins_is_zero_for_whitened_equal_views_and_finite_for_dead_dimensions() -> None:
    z, _ = rows(64, 4)
    u = torch.linalg.svd(z - z.mean(0), full_matrices=False).U * 1e3
    assert barlow_twins(u, 7 * u, 0.5).item() == pytest.approx(0, abs=1e-6)
    u[:, 0] = 2.0
    assert barlow_twins(u.requires_grad_(), u, 0.5).item() == pytest.approx(1, abs=1e-6)
    barlow_twins(u, u, 0.5).backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()
    assert standardise(u)[0][:, 0].abs().max() == 0


def test_vicreg_terms_answer_to_their_weights() -> None:
    z, other = rows(64, 4)
    assert vicreg(z, z, 1, 0, 0).item() == 0
    assert vicreg(torch.ones_like(z), torch.ones_like(z), 0, 1, 0).item() == pytest.approx(1 - math.sqrt(1e-4))
    assert vicreg(10 * z, 10 * other, 0, 1, 0).item() == 0
    assert vicreg(z[:, :1], other[:, :1], 0, 0, 1).item() == pytest.approx(0, abs=1e-12)
