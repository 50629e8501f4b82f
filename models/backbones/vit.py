"""Vision transformers: image -> representation, in the variants that published encoders use.

Parameter names are those of timm and DINOv2 (`blocks.0.attn.qkv.weight`), with three conventions. The position of the
class token is added to the class token, so that `pos_embed` holds the patches' positions only. Query, key and value are
one matrix. Positions are for one input size: an importer resamples them by its family's rule (`resampled`).

Source: Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021); layer scale: Touvron et al., CaiT (ICCV 2021);
registers: Darcet et al. (ICLR 2024); SwiGLU: Shazeer 2020; attention pooling: Zhai et al., SigLIP (ICCV 2023).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.encoder import Encoder

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Pool = Literal["class", "mean", "class+mean", "attention"]
Positions = Literal["learned", "sincos"]
FinalNorm = Literal["tokens", "pooled", "none"]


def activated(x: Tensor, activation: Activation) -> Tensor:
    """Apply GELU, its tanh approximation, or CLIP's sigmoid approximation x * sigmoid(1.702 x)."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Two linear layers with an activation between them: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(activated(self.fc1(x), self.activation))
        return y


class SwiGLU(nn.Module):
    """The SwiGLU MLP: silu(a) * b between two linear layers, where a and b are the halves of the first one's output."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        y: Tensor = self.w3(F.silu(a) * b)
        return y


def mlp(width: int, hidden: int, activation: Activation) -> MLP | SwiGLU:
    return SwiGLU(width, hidden) if activation == "swiglu" else MLP(width, hidden, activation)


class Attention(nn.Module):
    """Multi-head self-attention: (n, tokens, width) -> the same shape."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        return out


class AttentionPool(nn.Module):
    """Attention pooling, (n, tokens, width) -> (n, width): a learned query over all tokens, then a residual MLP."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = width // self.heads
        q = self.q(self.latent.expand(n, -1, -1)).reshape(n, 1, self.heads, split).transpose(1, 2)
        k, v = self.kv(x).reshape(n, tokens, 2, self.heads, split).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).reshape(n, width))
        out: Tensor = y + self.mlp(self.norm(y))
        return out


class LayerScale(nn.Module):
    """Layer scale: a learned factor for each channel."""

    def __init__(self, width: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Activation, qkv_bias: bool, layer_scale: bool, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1: nn.Module = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp(width, hidden, activation)
        self.ls2: nn.Module = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        y: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return y


class PatchEmbed(nn.Module):
    """(n, channels, size, size) -> (n, patches, width): one linear map of each patch."""

    def __init__(self, channels: int, patch: int, width: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.proj(x), 2).transpose(1, 2)


class ViT(Encoder):
    """(n, in_channels, size, size) float images -> (n, dimension) representations.

    dimension is `projection` if there is one, otherwise width, or twice the width for `class+mean`. The tokens are the
    class token, the registers and the patches row by row. `final_norm` says whether the last LayerNorm comes before
    pooling, on the tokens, or after it.
    """

    def __init__(
        self,
        *,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        in_channels: int = 3,
        class_token: bool = True,
        registers: int = 0,
        layer_scale: bool = False,
        activation: Activation = "gelu",
        positions: Positions = "learned",
        patch_bias: bool = True,
        qkv_bias: bool = True,
        pre_norm: bool = False,
        final_norm: FinalNorm = "tokens",
        eps: float = 1e-6,
        pool: Pool = "class",
        projection: int = 0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.final_norm = final_norm
        self.prefix = int(class_token) + registers
        self.patch_embed = PatchEmbed(in_channels, patch, width, patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        side = size // patch
        self.pos_embed: Tensor
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, side * side, width))
        else:
            self.register_buffer("pos_embed", sincos(side, width))
        self.norm_pre: nn.Module = nn.LayerNorm(width, eps=eps) if pre_norm else nn.Identity()
        block = (width, heads, hidden, activation, qkv_bias, layer_scale, eps)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))
        self.norm: nn.Module = nn.Identity() if final_norm == "none" else nn.LayerNorm(width, eps=eps)
        self.attn_pool = AttentionPool(width, heads, hidden, activation, eps) if pool == "attention" else None
        pooled = 2 * width if pool == "class+mean" else width
        self.proj = nn.Linear(pooled, projection, bias=False) if projection else nn.Identity()
        self.dimension = projection or pooled
        self._initialise()

    def _initialise(self) -> None:
        if self.pos_embed.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        tokens = (self.cls_token, self.register_tokens, self.pos_embed, self.attn_pool and self.attn_pool.latent)
        for token in tokens:
            if isinstance(token, nn.Parameter):
                nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        tokens = [it.expand(len(x), -1, -1) for it in (self.cls_token, self.register_tokens) if it is not None]
        x = self.norm_pre(torch.cat([*tokens, x], dim=1) if tokens else x)
        for block in self.blocks:
            x = block(x)
        pooled = self.norm(self._pool(x)) if self.final_norm == "pooled" else self._pool(self.norm(x))
        rows: Tensor = self.proj(pooled)
        return rows

    def _pool(self, x: Tensor) -> Tensor:
        if self.attn_pool is not None:
            rows: Tensor = self.attn_pool(x)
            return rows
        if self.pool == "class":
            return x[:, 0]
        mean = x[:, self.prefix :].mean(dim=1)
        return mean if self.pool == "mean" else torch.cat([x[:, 0], mean], dim=1)


def sincos(side: int, width: int) -> Tensor:
    """Fixed positions (1, side * side, width): sines and cosines of the column, then of the row.

    Source: Vaswani et al. 2017, in two dimensions as in MAE (He et al. 2022). Raises ValueError unless 4 divides width.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that 4 divides, not {width}")
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (column, row)]
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(waves, dim=1)[None].float()


def resampled(positions: Tensor, side: int, *, antialias: bool = False, offset: float = 0.0) -> Tensor:
    """Resample positions of a square grid of patches: (1, k * k, width) -> (1, side * side, width), bicubic.

    `offset` is added to the side before the scale is computed (0.1 in DINO and in DINOv2 without registers), which
    shifts the sampling points a little. Raises ValueError if the positions are not of a square grid.
    """
    count, width = positions.shape[1:]
    old = round(count**0.5)
    if old * old != count:
        raise ValueError(f"{count} positions are not those of a square grid of patches")
    if old == side:
        return positions
    grid = positions.float().reshape(1, old, old, width).permute(0, 3, 1, 2)
    if offset:
        factor = (side + offset) / old
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=antialias, align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(1, side * side, width)
