"""Parameter names and counts are torchvision's published ones; shapes follow width and stem."""

from typing import Any

import pytest
import torch

from models.backbones.resnet import ResNet

# torchvision's published parameter counts, less the classifier's (512 or 2048) * 1000 + 1000.
PUBLISHED = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
}
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "wide_resnet50_2": ({"name": "resnet50", "wide": 2}, 68_883_240 - 2_049_000),
    "wide_resnet101_2": ({"name": "resnet101", "wide": 2}, 126_886_696 - 2_049_000),
    "resnext50_32x4d": ({"name": "resnet50", "wide": 2, "groups": 32}, 25_028_904 - 2_049_000),
    "resnext101_32x8d": ({"name": "resnet101", "wide": 4, "groups": 32}, 88_791_336 - 2_049_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    encoder = ResNet(name)  # type: ignore[arg-type]
    assert sum(p.numel() for p in encoder.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_published_parameters(name: str) -> None:
    arguments, published = VARIANTS[name]
    with torch.device("meta"):
        encoder = ResNet(**arguments)
    assert sum(p.numel() for p in encoder.parameters()) == published
    with pytest.raises(ValueError, match="no bottlenecks"):
        ResNet("resnet18", wide=2)


def test_a_stride_stands_in_the_first_convolution_or_in_the_second() -> None:
    usual, first = ResNet("resnet50", width=2), ResNet("resnet50", width=2, stride_first=True)
    for encoder, strides in ((usual, (1, 2)), (first, (2, 1))):
        block = encoder.get_submodule("layer2.0")
        assert tuple(block.get_submodule(f"conv{i}").stride[0] for i in (1, 2)) == strides  # type: ignore[index, union-attr]


def test_names_are_torchvisions() -> None:
    names = ResNet("resnet50", width=2).state_dict().keys()
    for expected in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.num_batches_tracked",
        "layer3.5.conv3.weight",
        "layer4.2.bn3.bias",
    ):
        assert expected in names
    assert not any(name.startswith("fc.") for name in names)


@pytest.mark.parametrize(
    ("name", "width", "channels", "stem", "dimension", "side"),
    [
        ("resnet18", 4, 1, "3x3", 32, 28),
        ("resnet18", 4, 1, "3x3/2", 32, 14),
        ("resnet18", 4, 3, "3x3+2", 32, 30),
        ("resnet34", 6, 3, "7x7", 48, 7),
        ("resnet50", 2, 3, "3x3", 64, 28),
    ],
)
def test_shapes(name: str, width: int, channels: int, stem: str, dimension: int, side: int) -> None:
    encoder = ResNet(name, width=width, in_channels=channels, stem=stem).eval()  # type: ignore[arg-type]
    seen = {}
    encoder.layer1.register_forward_hook(lambda _, __, output: seen.update(side=output.shape[-1]))
    assert encoder.dimension == dimension
    assert encoder(torch.rand(2, channels, 28, 28)).shape == (2, dimension)
    assert seen["side"] == side


def test_a_residual_block_adds_its_input() -> None:
    """With the second BatchNorm's scale at zero, a block is the ReLU of its input."""
    block = ResNet("resnet18", width=4).layer1[1].eval()  # type: ignore[index, union-attr]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())
