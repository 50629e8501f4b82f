"""The vision transformer against torch's own encoder layer, written-out attention, and published parameter counts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.artifact import Architecture, ViTArchitecture, architecture
from models.backbones.vit import AttentionPool, SwiGLU, ViT, resampled, sincos
from models.engines.torch_engine import folded

SMALL: dict[str, Any] = {"size": 12, "patch": 4, "width": 16, "depth": 2, "heads": 2, "hidden": 24}


def random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return module.eval()


def layers(vit: ViT, x: Tensor, activation: Any = F.gelu) -> Tensor:
    """The blocks of `vit` by torch's own TransformerEncoderLayer."""
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, activation, 1e-6, batch_first=True, norm_first=True).eval()
        names = {"self_attn.in_proj_weight": "attn.qkv.weight", "self_attn.in_proj_bias": "attn.qkv.bias"}
        names |= {f"self_attn.out_proj.{it}": f"attn.proj.{it}" for it in ("weight", "bias")}
        for i in (1, 2):
            names |= {f"linear{i}.{it}": f"mlp.fc{i}.{it}" for it in ("weight", "bias")}
            names |= {f"norm{i}.{it}": f"norm{i}.{it}" for it in ("weight", "bias")}
        weights = block.state_dict()
        layer.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()})
        x = layer(x)
    return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
    ],
)
def test_the_forward_pass_is_that_of_torchs_own_layers(activation: Any, reference: Any) -> None:
    vit = ViT(**SMALL, activation=activation, registers=3)
    random_weights(vit)
    images = torch.randn(5, 3, 12, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)
    tokens = patches @ vit.patch_embed.proj.weight.flatten(1).T + vit.patch_embed.proj.bias + vit.pos_embed
    assert vit.cls_token is not None
    assert vit.register_tokens is not None
    x = torch.cat([vit.cls_token.expand(5, -1, -1), vit.register_tokens.expand(5, -1, -1), tokens], 1)
    x = vit.norm(layers(vit, x, reference))
    torch.testing.assert_close(vit(images), x[:, 0], rtol=1e-4, atol=1e-4)
    for pool, expected in (("mean", x[:, 4:].mean(1)), ("class+mean", torch.cat([x[:, 0], x[:, 4:].mean(1)], 1))):
        other = ViT(**SMALL, activation=activation, registers=3, pool=pool)  # type: ignore[arg-type]
        other.load_state_dict(vit.state_dict())
        assert other.eval().dimension == expected.shape[1]
        torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pre_norm_projection_and_norm_after_pooling_stand_where_they_should() -> None:
    vit = ViT(**SMALL, pre_norm=True, final_norm="pooled", pool="mean", projection=6, class_token=False)
    random_weights(vit)
    images = torch.randn(3, 3, 12, 12)
    x = layers(vit, vit.norm_pre(vit.patch_embed(images) + vit.pos_embed))
    torch.testing.assert_close(vit(images), vit.norm(x.mean(1)) @ vit.proj.weight.T, rtol=1e-4, atol=1e-4)  # type: ignore[operator]
    assert vit.dimension == 6


@torch.no_grad()
def test_layer_scale_multiplies_each_branch() -> None:
    plain, scaled = ViT(**SMALL), ViT(**SMALL, layer_scale=True)
    random_weights(plain)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(3, 3, 12, 12)
    for block in scaled.blocks:
        block.ls1.gamma.fill_(1)  # type: ignore[union-attr, operator]
        block.ls2.gamma.fill_(1)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(scaled.eval()(images), plain(images))
    for block in scaled.blocks:
        block.ls1.gamma.fill_(0.5)  # type: ignore[union-attr, operator]
        block.ls2.gamma.fill_(0.25)  # type: ignore[union-attr, operator]
    for block in plain.blocks:
        for part, factor in ((block.attn.proj, 0.5), (block.mlp.fc2, 0.25)):  # type: ignore[union-attr]
            part.weight.mul_(factor)  # type: ignore[union-attr, operator]
            part.bias.mul_(factor)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(scaled(images), plain(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_swiglu_gates_its_second_half_with_the_silu_of_the_first() -> None:
    layer = SwiGLU(4, 3)
    random_weights(layer)
    x = torch.randn(7, 4)
    a, b = (x @ layer.w12.weight.T + layer.w12.bias).split(3, dim=1)
    expected = (a / (1 + torch.exp(-a)) * b) @ layer.w3.weight.T + layer.w3.bias
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_attention_pooling_is_multi_head_attention_of_one_query() -> None:
    pool = AttentionPool(16, 2, 24, "gelu", 1e-6)
    random_weights(pool)
    x = torch.randn(3, 9, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    attention.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
    attention.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
    attention.out_proj.load_state_dict(pool.proj.state_dict())
    y = attention(pool.latent.expand(3, -1, -1), x, x)[0][:, 0]
    torch.testing.assert_close(pool(x), y + pool.mlp(pool.norm(y)), rtol=1e-5, atol=1e-5)


def test_fixed_positions_are_sines_and_cosines_of_column_and_row() -> None:
    positions = sincos(3, 8)[0].reshape(3, 3, 8)
    for row in range(3):
        for column in range(3):
            angles = [column, column / 100, row, row / 100]
            expected = [*map(math.sin, angles[:2]), *map(math.cos, angles[:2])]
            expected += [*map(math.sin, angles[2:]), *map(math.cos, angles[2:])]
            assert positions[row, column].tolist() == pytest.approx(expected, abs=1e-6)
    fixed = ViT(**SMALL, positions="sincos")
    assert "pos_embed" not in dict(fixed.named_parameters())
    assert "pos_embed" in fixed.state_dict()
    with pytest.raises(ValueError, match="4 divides"):
        sincos(3, 6)


def test_positions_are_resampled_by_the_familys_rule() -> None:
    positions = torch.randn(1, 16, 5)
    assert resampled(positions, 4) is positions
    flat = torch.ones(1, 16, 5)
    for rule in ({}, {"antialias": True}, {"offset": 0.1}):
        torch.testing.assert_close(resampled(flat, 7, **rule), torch.ones(1, 49, 5))  # type: ignore[arg-type]
        assert resampled(positions, 3, **rule).shape == (1, 9, 5)  # type: ignore[arg-type]
    assert not torch.allclose(resampled(positions, 3), resampled(positions, 3, antialias=True))
    assert not torch.allclose(resampled(positions, 7), resampled(positions, 7, offset=0.1))
    with pytest.raises(ValueError, match="square grid"):
        resampled(positions[:, :15], 3)


# timm's published counts less the classifier's width * 1000 + 1000, at 224 pixels; ours keeps no position of the class
# token (width), which is part of the token.
PUBLISHED = {
    "vit_tiny_patch16": 5_717_416 - 193_000 - 192,
    "vit_small_patch16": 22_050_664 - 385_000 - 384,
    "vit_base_patch16": 86_567_656 - 769_000 - 768,
    "vit_large_patch16": 304_326_632 - 1_025_000 - 1024,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_geometries_have_the_published_parameters(name: str) -> None:
    chosen = architecture(name, size=224)
    with torch.device("meta"):
        encoder = chosen.build()
    assert sum(p.numel() for p in encoder.parameters()) == PUBLISHED[name]
    assert chosen.named() == name


def test_architectures_by_name() -> None:
    assert architecture("resnet18", size=32) == Architecture(name="resnet18", stem="3x3")
    assert architecture("resnet50", size=224, width=128) == Architecture(name="resnet50", width=128)
    tiny = architecture("vit_tiny_patch4", size=28, in_channels=1, positions="sincos")
    assert isinstance(tiny, ViTArchitecture)
    assert tiny.build()(torch.zeros(2, 1, 28, 28)).shape == (2, 192)
    for name, size, message in (
        ("vit_tiny_patch5", 32, "no multiple of patch"),
        ("vit_gigantic_patch4", 32, "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            architecture(name, size=size)
    with pytest.raises(ValueError, match="needs a class token"):
        architecture("vit_tiny_patch4", size=32, class_token=False)


@torch.no_grad()
def test_made_ready_to_serve_it_is_the_same_function() -> None:
    vit = ViT(**SMALL)
    random_weights(vit)
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(folded(vit)(x), vit(x))
