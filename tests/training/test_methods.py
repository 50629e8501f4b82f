"""Losses against naive float64 loops, and the parts of each method that its paper insists on."""

import math

import pytest
import torch
from torch import Tensor

from models.backbones import ResNet
from training.methods import BYOL, DirectCLR, SimCLR
from training.methods.byol import regression
from training.methods.directclr import info_nce
from training.methods.simclr import nt_xent


def rows(n: int = 6, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def small_encoder() -> ResNet:
    torch.manual_seed(0)
    return ResNet("resnet18", width=4, in_channels=1, stem="3x3/2")


def views(n: int = 8) -> Tensor:
    return torch.randn(2 * n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_nt_xent_is_equation_1_of_simclr() -> None:
    z1, z2 = rows()
    z, n, temperature = torch.cat([z1, z2]), len(z1), 0.3
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        denominator = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(cosine(z[i], z[j]) / temperature) / denominator)
    assert float(nt_xent(z1, z2, temperature)) == pytest.approx(total / (2 * n), rel=1e-12)


def test_info_nce_takes_its_negatives_from_the_other_view_only() -> None:
    z1, z2 = rows()
    n, temperature = len(z1), 0.1
    total = 0.0
    for a, b in ((z1, z2), (z2, z1)):
        for i in range(n):
            denominator = sum(math.exp(cosine(a[i], b[k]) / temperature) for k in range(n))
            total -= math.log(math.exp(cosine(a[i], b[i]) / temperature) / denominator)
    assert float(info_nce(z1, z2, temperature)) == pytest.approx(total / (2 * n), rel=1e-12)


def test_regression_is_equation_2_of_byol() -> None:
    p, t = rows()
    expected = sum(2 - 2 * cosine(a, b) for a, b in zip(p, t, strict=True)) / len(p)
    assert float(regression(p, t)) == pytest.approx(expected, rel=1e-12)
    assert float(regression(p, 3 * p)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [lambda a, b: nt_xent(a, b, 0.5), lambda a, b: info_nce(a, b, 0.5), regression])
def test_gradients_agree_with_finite_differences(loss) -> None:  # type: ignore[no-untyped-def]
    z1, z2 = rows(4, 3)
    assert torch.autograd.gradcheck(loss, (z1.requires_grad_(), z2.requires_grad_()))


def test_directclr_sends_no_direct_gradient_past_d0() -> None:
    method = DirectCLR(small_encoder(), d0=8)
    h = torch.randn(6, 32, requires_grad=True)
    z1, z2 = method.project(h).chunk(2)
    info_nce(z1, z2, 0.1).backward()
    assert h.grad is not None
    assert h.grad[:, :8].abs().min() > 0
    assert h.grad[:, 8:].abs().max() == 0


@pytest.mark.parametrize("d0", [0, 33])
def test_directclr_refuses_a_d0_outside_the_representation(d0: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the representation's 32"):
        DirectCLR(small_encoder(), d0=d0)


def test_byol_target_gets_no_gradient_and_follows_as_an_average() -> None:
    method = BYOL(small_encoder(), projection=8, hidden=16, momentum=0.9)
    method(views()).backward()
    assert all(p.grad is None for p in method.target.parameters())
    online = dict(method.online.named_parameters())
    before = {name: p.clone() for name, p in method.target.named_parameters()}
    with torch.no_grad():
        for p in online.values():
            p.add_(1.0)
    method.step(0.0)
    for name, p in method.target.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * online[name])
    frozen = [p.clone() for p in method.target.parameters()]
    method.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(frozen, method.target.parameters(), strict=True))


def test_byol_target_follows_batch_norm_statistics_too() -> None:
    method = BYOL(small_encoder(), projection=8, hidden=16, momentum=0.5)
    method(views())
    online, target = method.online.state_dict(), method.target.state_dict()
    key = "0.bn1.running_mean"
    expected = (online[key] + target[key]) / 2
    method.step(0.0)
    torch.testing.assert_close(method.target.state_dict()[key], expected)


def test_byol_without_stop_gradient_trains_both_sides() -> None:
    broken = BYOL(small_encoder(), projection=8, hidden=16, predictor=False, stop_gradient=False)
    assert broken.target is broken.online
    whole = BYOL(small_encoder(), projection=8, hidden=16)
    assert sum(p.numel() for p in broken.parameters()) < sum(p.numel() for p in whole.parameters()) / 1.5
    bare = BYOL(small_encoder(), predictor=False, stop_gradient=False, projector=False)
    assert bare.online(views()).shape == (16, 32)
    broken(views()).backward()
    assert all(p.grad is not None for p in broken.online.parameters())


@pytest.mark.parametrize(
    "method",
    [lambda e: SimCLR(e), lambda e: DirectCLR(e, d0=8), lambda e: BYOL(e)],
    ids=["simclr", "directclr", "byol"],
)
def test_a_step_down_the_gradient_lowers_the_loss(method) -> None:  # type: ignore[no-untyped-def]
    model, batch = method(small_encoder()), views()
    before = model(batch)
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(1e-3 * p.grad)
    assert model(batch).item() < before.item()
