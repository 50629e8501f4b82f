"""The laws of noisy steps against products of random matrices and against sums over pairs."""

import math

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
    nothing = torch.tensor(0.0, dtype=F64)
    law = Steps(torch.tensor(shrink, dtype=F64), torch.tensor(noise, dtype=F64), nothing, nothing, m)
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


def test_the_second_order_is_right_while_no_row_kicks_by_more_than_a_quarter() -> None:
    """One row that multiplies the block by u(I − (c/u)(ee′ − I)): the determinant is known, |e|² is χ²_m."""
    square = torch.linspace(0, 150, 600_001, dtype=F64)[1:]
    nothing, one = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)

    def apart(m: int, kick: float) -> float:
        """Exact mean log |det| less the second order's, over the kick."""
        c = kick / m
        density = ((m / 2 - 1) * square.log() - square / 2).exp()
        logs = (1 - c * square / (1 + c)).abs().clamp(min=1e-300).log()
        exact = m * math.log1p(c) + float((density * logs).sum() / density.sum())
        law = Steps(one, torch.tensor(c * c, dtype=F64), nothing, torch.tensor(kick, dtype=F64), m)
        return (exact - m * float(law.mean())) / kick

    assert max(abs(apart(m, kick)) for m in (2, 3, 4, 8, 32) for kick in (0.1, 0.2, 0.25)) < 1 / 8
    assert max(abs(apart(m, 2 / 3)) for m in (4, 8, 32)) > 1 / 4
    e, c = normal(torch.Generator().manual_seed(3), 4), 0.2
    matrix = (1 + c) * torch.eye(4, dtype=F64) - c * torch.outer(e, e)
    det = (1 + c) ** 4 * (1 - c * float(e.square().sum()) / (1 + c))
    assert float(torch.linalg.det(matrix)) == pytest.approx(det, rel=1e-12)


def test_the_kick_is_that_of_the_row_with_the_most_open_gate() -> None:
    alpha = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]], dtype=F64)
    law = steps_of(alpha[None], torch.zeros(3, 1, dtype=F64), torch.tensor([4.0], dtype=F64), 1.0, 0.3, 2)
    factor = 1 - 0.1 * 2 * 0.7
    assert float(law.kick) == pytest.approx(0.1 * 4 * 0.6 * 2 / factor, rel=1e-12)
