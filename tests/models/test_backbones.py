"""Parameter names and counts are torchvision's published ones; shapes follow width and stem."""

import pytest
import torch

from models.backbones.resnet import ResNet

# torchvision's published parameter counts, less the classifier's (512 or 2048) * 1000 + 1000.
PUBLISHED = {
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    encoder = ResNet(name)  # type: ignore[arg-type]
    assert sum(p.numel() for p in encoder.parameters()) == PUBLISHED[name]


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
