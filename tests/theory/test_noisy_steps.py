"""The laws of noisy steps against products of random matrices and against sums over pairs."""

import pytest
import torch

from theory.noisy_steps import Steps, steps_of, variance
from theory.toys import F64, attention, normal


def test_singular_values_of_a_product_follow_the_laws() -> None:
    """Exponents of 3,000 random steps by QR: their mean and the last agree, and the first keeps under its bound."""
    generator, m, shrink, noise = torch.Generator().manual_seed(0), 6, 0.85, 0.004
    basis, growth = torch.eye(m, dtype=F64), torch.zeros(m, dtype=F64)
    for _ in range(3000):
        entries = normal(generator, m, m) * noise**0.5
        step = shrink * torch.eye(m, dtype=F64) + (entries + entries.T) / 2**0.5  # diagonal twice the variance
        basis, r = torch.linalg.qr(step @ basis)
        growth += r.diagonal().abs().log()
    seen = growth / 3000
    law = Steps(torch.tensor(shrink, dtype=F64), torch.tensor(noise, dtype=F64), torch.tensor(0.0, dtype=F64), m)
    assert float(seen.mean()) == pytest.approx(float(law.mean()), rel=0.01)
    assert float(seen[-1]) == pytest.approx(float(law.fastest()), rel=0.03)
    assert float(seen[0]) < float(law.slowest()) < float(seen[0]) + 0.01
    assert abs(float(law.mean()) - float(law.factor.log())) > 0.1 * abs(float(seen.mean()))  # the noise matters here


def test_the_variance_of_a_step_is_that_of_the_sum_over_pairs() -> None:
    generator, n, k, unit, draws = torch.Generator().manual_seed(1), 10, 3.0, 0.7, 20_000
    clean = normal(generator, n, 3)
    alpha = attention(clean, clean + 0.3 * normal(generator, n, 3))
    off = alpha - torch.diag(alpha.diagonal())
    x, moved = normal(generator, draws, n, 2) * unit**0.5, normal(generator, draws, n, 2) * k**0.5
    gaps = x[:, :, None] - x[:, None]
    spread = (off * gaps[..., 0] * gaps[..., 1]).sum((1, 2))
    entry = spread - ((1 - alpha.diagonal()) * moved[..., 0] * moved[..., 1]).sum(1)
    assert float(entry.var()) == pytest.approx(float(variance(alpha, torch.tensor(k, dtype=F64), unit)), rel=0.06)
    own = (off * gaps[..., 0].square()).sum((1, 2)) - ((1 - alpha.diagonal()) * moved[..., 0].square()).sum(1)
    assert float(own.var()) == pytest.approx(2 * float(entry.var()), rel=0.1)
    gates = float((1 - alpha.diagonal()).sum())
    assert float(own.mean()) == pytest.approx((2 * unit - k) * gates, rel=0.05)
    coupled = (off[..., None] * gaps[..., :1] * (clean[:, None] - clean)).sum((1, 2)).square().sum(-1).mean()
    law = steps_of(alpha[None], clean, torch.tensor([k], dtype=F64), unit, 0.5, 2)
    assert float(law.coupling) == pytest.approx((0.5 / n) ** 2 * float(coupled), rel=0.05)
    assert float(law.factor) == pytest.approx(1 + 0.5 / n * (2 * unit - k) * gates, rel=1e-12)
