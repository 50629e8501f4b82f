"""Identities to 1e-10 and closed forms to 1e-6, against references written independently of the labs."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from theory import (
    barlow_twins,
    directpred,
    eigenspace_alignment,
    frustration,
    implicit_regularization,
    label_graph,
    linear_byol,
    measurement,
    noncontrastive_dynamics,
    projector,
    readout,
    redundancy,
    strong_augmentation,
)
from theory.toys import F64, attention, batches, infonce, normal, orthogonal, runge_kutta


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_infonce_and_attention_against_loops(generator: torch.Generator) -> None:
    z, pair = normal(generator, 6, 3), normal(generator, 6, 3)
    total, alpha = 0.0, np.zeros((6, 6))
    for i in range(6):
        weights = [
            math.exp(-0.5 * float(((z[i] - (pair[i] if i == j else z[j])) ** 2).sum()))  # own pair, others' originals
            for j in range(6)
        ]
        alpha[i] = np.array(weights) / sum(weights)
        total -= math.log(alpha[i, i])
    assert float(infonce(z, pair)) == pytest.approx(total, rel=1e-12)
    assert np.allclose(attention(z, pair).numpy(), alpha, rtol=1e-12)
    stacked = infonce(torch.stack([z, 2 * z]), torch.stack([pair, pair]))
    assert float(stacked[0]) == pytest.approx(total, rel=1e-12)


def test_infonce_gradient_is_minus_wx_with_the_double_sum(generator: torch.Generator) -> None:
    x, pair, w = normal(generator, 9, 4), normal(generator, 9, 4), normal(generator, 3, 4)
    alpha = attention(x @ w.T, pair @ w.T)
    field = torch.zeros(4, 4, dtype=F64)
    for i in range(9):
        for j in range(9):
            step = pair[i] - x[i] if i == j else x[i] - x[j]
            weight = -(1 - alpha[i, i]) if i == j else alpha[i, j]
            field += weight * torch.outer(step, step)
    found = strong_augmentation.gradient(w, x, pair)
    assert float((found + w @ field).norm() / found.norm()) < 1e-10
    assert float((field - strong_augmentation.contrast(w, x, pair)).norm() / field.norm()) < 1e-10


def test_batches_are_without_replacement(generator: torch.Generator) -> None:
    rows = torch.arange(40, dtype=F64)[:, None]
    stream = batches(rows, 10, generator)
    epoch = torch.cat([next(stream) for _ in range(4)])
    assert sorted(epoch.flatten().tolist()) == rows.flatten().tolist()


def test_runge_kutta_is_of_fourth_order() -> None:
    errors = []
    for count in (10, 20):
        state = [torch.ones(1, dtype=F64)]
        for _ in range(count):
            state = runge_kutta(lambda now: [now[0] * 1.5], state, 1 / count)
        errors.append(abs(float(state[0]) - math.exp(1.5)))
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)


def test_orthogonal_is(generator: torch.Generator) -> None:
    q = orthogonal(generator, 7)
    assert torch.allclose(q @ q.T, torch.eye(7, dtype=F64), atol=1e-12)


def test_sampled_rank_against_sampling(generator: torch.Generator) -> None:
    spectrum, n = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.5], dtype=F64), 60
    z = normal(generator, 4000, n, 5) * spectrum.sqrt()
    z = z - z.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(z.mT @ z / n)
    p = values / values.sum(1, keepdim=True)
    seen = float(torch.exp(-(p * p.log()).sum(1)).mean())
    plain = measurement.entropy_rank(spectrum)
    expected = measurement.sampled_rank(spectrum, n)
    assert abs(seen - expected) < 0.1 * abs(seen - plain)  # the first order explains nine tenths of the bias


def test_deep_singular_values_follow_the_closed_form() -> None:
    for depth in (1, 2, 3):
        given = implicit_regularization.Parameters(depth=depth, dimension=6)
        assert implicit_regularization.closed_form(given)[0] < 1e-6


def test_layer_gradients_are_the_derivative_of_a_quadratic(generator: torch.Generator) -> None:
    root = normal(generator, 5, 5)
    weights = [normal(generator, 5, 5).requires_grad_() for _ in range(3)]
    value = 0.5 * (weights[2] @ weights[1] @ weights[0] @ root).square().sum()  # its gradient is W X, X = root rootᵀ
    found = torch.autograd.grad(value, weights)
    flow = implicit_regularization.layer_gradients([w.detach() for w in weights], root @ root.T)
    for slope, velocity in zip(found, flow, strict=True):
        assert float((slope - velocity).norm() / slope.norm()) < 1e-10


def test_two_layers_conserve_their_balance() -> None:
    assert implicit_regularization.conserved(implicit_regularization.Parameters(dimension=6)) < 1e-6


def test_padded_networks_are_the_plain_ones(generator: torch.Generator) -> None:
    weights, trained, rectified = implicit_regularization.stack([1, 3], [False, True], 4, generator)
    x = normal(generator, 5, 4)
    z = implicit_regularization.forward(weights, x, rectified)
    assert torch.allclose(z[0], x @ weights[0, 2].T)
    assert torch.allclose(z[1], ((x @ weights[1, 0].T).relu() @ weights[1, 1].T).relu() @ weights[1, 2].T)
    assert trained.sum(1).tolist() == [1, 3]


@pytest.mark.parametrize("augmentation", [0.25, 1.3])
def test_noncontrastive_flow_is_autograds(augmentation: float) -> None:
    given = noncontrastive_dynamics.Parameters(dimension=5, augmentation=augmentation, seed=4)
    assert max(noncontrastive_dynamics.gradient_errors(given)) < 1e-10


def test_fixed_points_are_where_the_mode_stands_still() -> None:
    for p in linear_byol.fixed_points(0.4, 0.07):
        assert p * (1 - 1.4 * p) == pytest.approx(0.07, rel=1e-12)
    assert math.isnan(linear_byol.fixed_points(0.25, 0.21)[0])
    size = directpred.fixed_size(0.7, 0.3)
    assert math.sqrt(size) + 0.3 * size == pytest.approx(0.7, rel=1e-12)


def test_direct_rules(generator: torch.Generator) -> None:
    u, s = orthogonal(generator, 3), torch.tensor([0.04, 0.25, 1.0], dtype=F64)
    f = u @ torch.diag(s) @ u.T
    expected = {
        directpred.direct_pred(0.1): [0.3, 0.6, 1.1],
        directpred.normalised(0.1): [0.3, 0.6, 1.1],
        directpred.direct_copy(0.1): [0.14, 0.35, 1.1],
    }
    for rule, values in expected.items():
        found = u.T @ directpred.predictor_of(rule, f) @ u
        assert torch.allclose(found, torch.diag(torch.tensor(values, dtype=F64)), atol=1e-10)
    doubled = [
        directpred.predictor_of(rule, 4 * f) for rule in (directpred.direct_pred(0.1), directpred.normalised(0.1))
    ]
    assert torch.linalg.eigvalsh(doubled[0])[-1] == pytest.approx(2.4)  # the two rules differ by more than scale
    assert torch.linalg.eigvalsh(doubled[1])[-1] == pytest.approx(1.1)


def test_commutator_obeys_its_equation(generator: torch.Generator) -> None:
    given = eigenspace_alignment.Parameters(dimension=5, augmentation=0.7, predictor_rate=2.0)
    a, b = normal(generator, 5, 5), normal(generator, 5, 5)
    f, p = a @ a.T, b + b.T
    f_dot, p_dot = eigenspace_alignment.symmetric_flow(given, f, p)
    k = eigenspace_alignment.restoring(given, f, p)
    bracket = f @ p - p @ f
    moved = (f_dot @ p - p @ f_dot) + (f @ p_dot - p_dot @ f)
    assert float((moved + k @ bracket + bracket @ k).norm() / moved.norm()) < 1e-10


def test_frustration_spectrum_is_that_of_the_label_graph() -> None:
    a = label_graph.assignment(30, 3, 0.2, "pair")
    assert torch.allclose(a.sum(1), torch.ones(30, dtype=F64))
    b = a.T / a.sum(0)[:, None]
    direct = torch.linalg.eigvals(b @ a).real.sort(descending=True).values
    assert torch.allclose(label_graph.spectrum(a), direct, atol=1e-10)
    everyone = label_graph.spectrum(label_graph.assignment(30, 3, 0.2, "all"))
    assert everyone.tolist() == pytest.approx([1.0, 0.8, 0.8], abs=1e-10)


@pytest.mark.parametrize("gap", [0.5, 2.0, 6.0])
def test_both_bounds_of_the_nearest_mean_meet_for_two_classes(gap: float, generator: torch.Generator) -> None:
    means = torch.tensor([[0.0, 0.0], [gap * 0.6, gap * 0.8]], dtype=F64)
    exact = NormalDist(0, 1).cdf(gap / 2 / 0.7)
    assert readout.at_least(means, 0.7) == pytest.approx(exact, rel=1e-12)
    assert readout.at_most(means, 0.7) == pytest.approx(exact, rel=1e-12)
    share, error = readout.accuracy(means, 0.7, generator)
    assert share == pytest.approx(exact, abs=4.5 * error)


def test_the_nearest_of_three_means_on_a_line_lies_between_its_bounds(generator: torch.Generator) -> None:
    means = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    right = NormalDist(0, 1).cdf(0.5 / 0.4)  # the outer two; the middle one errs on both sides
    exact = (2 * right + (2 * right - 1)) / 3
    share, error = readout.accuracy(means, 0.4, generator)
    assert share == pytest.approx(exact, abs=4.5 * error)
    assert readout.at_least(means, 0.4) < exact < readout.at_most(means, 0.4)


def test_frustration_identities() -> None:
    given = frustration.Parameters(samples=30, classes=3, dimension=8, frustrated=0.3, seed=2)
    assert all(claim.holds for claim in frustration.identities(given))


def test_cross_correlation_against_numpy(generator: torch.Generator) -> None:
    a, b = normal(generator, 50, 3) + 5, normal(generator, 50, 3) * 2
    expected = np.corrcoef(a.T.numpy(), b.T.numpy())[:3, 3:]
    assert np.allclose(barlow_twins.correlation(a, b).numpy(), expected, atol=1e-12)
    on, off = ((1 - np.diag(expected)) ** 2).sum(), (expected**2).sum() - (np.diag(expected) ** 2).sum()
    assert float(barlow_twins.barlow(a, b, 0.3)) == pytest.approx(on + 0.3 * off, rel=1e-12)


def spread_out(dimension: int, noisy: int) -> torch.Tensor:
    """Orthogonal (d, d) whose rows all have the share m/d in the last m columns: waves, in pairs of one frequency."""
    n = torch.arange(dimension, dtype=F64)
    waves = [
        turn(2 * math.pi * f * n / dimension) for f in range(1, (dimension + 1) // 2) for turn in (torch.cos, torch.sin)
    ]
    alone = [torch.ones(dimension, dtype=F64), (-1) ** n][: 2 - dimension % 2]
    columns = waves[noisy - noisy % 2 :] + alone[noisy % 2 :] + waves[: noisy - noisy % 2] + alone[: noisy % 2]
    return torch.stack([column / column.norm() for column in columns], 1)


@pytest.mark.parametrize(
    ("d", "m", "k", "lam"), [(16, 8, 4.0, 0.3), (9, 3, 1.0, 0.05), (12, 4, 0.2, 1.0), (7, 1, 9.0, 0.7)]
)
def test_the_least_barlow_twins_loss_is_reached_and_not_passed(
    d: int, m: int, k: float, lam: float, generator: torch.Generator
) -> None:
    best = redundancy.best(d, m, k, lam)
    penalty = torch.tensor(lam, dtype=F64)
    kept = torch.cat([torch.full((d - m,), best.clean, dtype=F64), torch.full((m,), best.share / (1 + k), dtype=F64)])
    reached = spread_out(d, m) * kept.sqrt()
    c, s = redundancy.outputs(reached, m, k)
    assert float(redundancy.endless_loss(c, penalty)) == pytest.approx(best.loss, rel=1e-10)
    p = torch.linalg.eigvalsh(s) / d
    assert float(torch.exp(-(p * p.log()).sum())) == pytest.approx(best.rank(), rel=1e-10)
    for size in (1e-3, 0.1, 10.0):
        c, s = redundancy.outputs(reached + size * normal(generator, 50, d, d), m, k)
        losses, shares = redundancy.endless_loss(c, penalty), s.diagonal(dim1=-2, dim2=-1)[:, -m:].mean(1)
        p = torch.linalg.eigvalsh(s).clamp(min=1e-300) / d
        for loss, share, rank in zip(losses, shares, torch.exp(-(p * p.log()).sum(1)), strict=True):
            assert loss >= best.loss
            assert abs(share - best.share) <= best.share_within(float(loss))
            least, most = best.ranks(float(loss))
            assert least - 1e-9 <= rank <= most + 1e-9


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95, 1.0])
def test_the_expected_batch_loss_against_integrals_of_the_correlations_density(rho: float) -> None:
    n, r = 32, np.linspace(-1, 1, 200_001)[1:-1]
    c = torch.tensor([[rho, rho], [rho, rho]], dtype=F64)
    found = float(redundancy.batch_loss(c, torch.tensor(1.0, dtype=F64), n))
    if rho == 1:
        assert found == pytest.approx(2.0)
        return
    # Fisher's density of r without its constant: an integral over the hyperbolic angle, by the midpoint rule.
    angles = np.arange(0.025, 12, 0.05)
    density = sum((np.cosh(angle) - rho * r) ** (1 - n) for angle in angles) * (1 - r**2) ** ((n - 4) / 2)
    mean, square = (density * r).sum() / density.sum(), (density * r**2).sum() / density.sum()
    assert found == pytest.approx(2 * (1 - 2 * mean + square) + 2 * square, rel=1e-6)


def test_projector_gradient_at_h_is_the_masked_one() -> None:
    given = projector.Parameters(dimension=6, kept=2, batch=16)
    network = projector.start(given)
    at_r, at_h, at_b = projector.backward(given, network)
    x = normal(given.generator(), 16, 6)
    mask = (x @ network.w.T @ network.a.T > 0).to(F64)
    assert torch.allclose(at_h, at_r + (at_r @ network.b * mask) @ network.a, atol=1e-12)
    assert float(at_b[2:].abs().max()) == 0
