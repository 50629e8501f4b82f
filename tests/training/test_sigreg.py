"""The Epps-Pulley statistic against its closed form and a fine integral; what it asks for, and of whom."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from fullrank.gaussianity import random_slices as slices
from tests.support.training import small, train, views
from training.methods.sigreg import epps_pulley, sigreg


def closed_form(x: np.ndarray) -> float:
    """T over the whole line: pairs of rows, rows against the Gaussian, the Gaussian against itself."""
    n = len(x)
    pairs = np.exp(-((x[:, None] - x[None]) ** 2) / 2).sum() / n**2
    cross = np.sqrt(2) * np.exp(-(x**2) / 4).sum() / n
    return n * math.sqrt(2 * math.pi) * (pairs - cross + 1 / math.sqrt(3))


def samples(n: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "gaussian": generator.standard_normal(n),
        "uniform": generator.uniform(-1.7, 1.7, n),
        "shifted": generator.standard_normal(n) + 0.8,
        "narrow": 0.2 * generator.standard_normal(n),
        "two points": np.sign(generator.standard_normal(n)),
        "one point": np.full(n, 0.3),
    }


@pytest.mark.parametrize("name", samples())
def test_the_statistic_is_its_closed_form_and_its_integral(name: str) -> None:
    x = samples()[name]
    found = float(epps_pulley(torch.from_numpy(x)[:, None]))
    assert found == pytest.approx(closed_form(x), rel=1e-4, abs=1e-5)

    def integrand(t: float) -> float:
        return float(abs(np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2))

    expected = len(x) * integrate.quad(integrand, -5, 5, limit=200)[0]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_its_mean_under_the_gaussian_does_not_depend_on_the_number_of_rows() -> None:
    """E T = int (1 - phi^2) w dt = sqrt(2 pi) (1 - 1/sqrt 3): what is left when there is nothing to mend."""
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    for n in (16, 256):
        x = torch.randn(n, 4000, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        found = epps_pulley(x)
        assert float(found.mean()) == pytest.approx(expected, abs=4 * float(found.std()) / math.sqrt(4000))


def test_the_gradient_is_that_of_the_closed_form() -> None:
    x = torch.from_numpy(samples()["shifted"]).requires_grad_()
    epps_pulley(x[:, None]).sum().backward()
    values, step = x.detach().numpy(), 1e-5
    for i in (0, 7, 39):
        up, down = values.copy(), values.copy()
        up[i] += step
        down[i] -= step
        slope = (closed_form(up) - closed_form(down)) / (2 * step)
        assert float(x.grad[i]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_slices_are_uniform_on_the_sphere_and_a_function_of_the_step() -> None:
    a = slices(16, 4096, seed=3)
    assert torch.allclose(a.norm(dim=0), torch.ones(4096))
    torch.testing.assert_close(a @ a.T / 4096, torch.eye(16) / 16, atol=0.01, rtol=0)
    assert stats.kstest((a[0] + 1) / 2, stats.beta(7.5, 7.5).cdf).pvalue > 1e-3
    assert torch.equal(a, slices(16, 4096, seed=3))
    assert not torch.equal(a, slices(16, 4096, seed=4))


def test_an_isotropic_cloud_is_preferred_to_a_collapsed_one() -> None:
    generator = torch.Generator().manual_seed(0)
    round_, a = torch.randn(256, 16, generator=generator), slices(16, 256, 0)
    flat = round_ * torch.tensor([1.0] * 8 + [0.01] * 8)
    losses = [float(sigreg(z, z, a, weight=1.0)) for z in (round_, flat, torch.zeros_like(round_))]
    assert losses == sorted(losses)
    assert losses[1] > 3 * losses[0]


def test_each_step_draws_new_slices_and_a_resumed_run_the_same() -> None:
    model = small("sigreg").eval()
    first = model(views()).item()
    assert model(views()).item() == first
    model.step(0.0)
    assert model(views()).item() != first
    other = small("sigreg").eval()
    other.load_state_dict(model.state_dict())
    assert other(views()).item() == model(views()).item()
    assert int(train(small("sigreg"), 3).steps) == 3
