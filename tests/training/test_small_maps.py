"""Small-map convolutions against torch's, in float64: values and every gradient; and what a trainer makes of them."""

import pytest
import torch
from torch import nn

from models.artifact import Architecture
from models.engines.torch_engine import folded
from training.small_maps import SmallMapConv2d, quicken


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "h", "w"),
    [
        (3, 1, 1, 2, 2),
        (3, 2, 1, 4, 4),
        (3, 2, 1, 3, 4),
        (3, 1, 1, 1, 3),
        (5, 2, 2, 4, 2),
        (3, 1, 1, 4, 4),
        (3, 2, 1, 7, 7),
    ],
)
def test_values_and_gradients_are_the_convolution_s(kernel: int, stride: int, padding: int, h: int, w: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, kernel, stride, padding, bias=False).double()
    holder = nn.Sequential(plain)
    quicken(holder)
    quick = holder[0]
    assert type(quick) is SmallMapConv2d
    assert quick.weight is plain.weight
    x = torch.randn(6, 3, h, w, dtype=torch.float64)
    found = []
    for layer in (plain, quick):
        entered = x.clone().requires_grad_()
        y = layer(entered)
        weights = torch.arange(y.numel(), dtype=torch.float64).view_as(y).cos()
        found.append((y.detach(), *torch.autograd.grad((y.square() * weights).sum(), [entered, plain.weight])))
    for mine, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2, bias=False)]
)
def test_what_does_not_fit_is_left_alone(layer: nn.Conv2d) -> None:
    holder = nn.Sequential(layer)
    quicken(holder)
    assert holder[0] is layer


def test_a_whole_encoder_keeps_its_names_and_its_representations() -> None:
    torch.manual_seed(0)
    encoder = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2").build().eval()
    x = torch.randn(5, 1, 28, 28)
    before, names = encoder(x), list(encoder.state_dict())
    quicken(encoder)
    assert sum(isinstance(module, SmallMapConv2d) for module in encoder.modules()) == 17
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [28, 32])
def test_with_its_norms_folded_an_encoder_is_the_same(size: int) -> None:
    """What measures an encoder in training runs it folded: the layer has a bias then, on maps of any size."""
    torch.manual_seed(0)
    encoder = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2").build()
    x = torch.randn(32, 1, size, size)
    with torch.no_grad():
        encoder.train()(3 * x + 1)  # statistics that are not the initial ones
        for module in encoder.eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()
        before = encoder(x)
        quicken(encoder)
        torch.testing.assert_close(encoder(x), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(folded(encoder)(x), before, rtol=1e-4, atol=1e-4)
