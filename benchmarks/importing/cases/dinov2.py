# mypy: ignore-errors
"""DINOv2 by the copy of its code in lightly-train."""

from typing import Any

import torch
from cases.common import DEPTH, Case, Scale, case, imagenet, lively, prefixed, saver


def dinov2(scale: Scale, registers: int, chunks: int, ffn: str) -> Case:
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer

    width = scale.of(16, 384)
    model = DinoVisionTransformer(
        img_size=scale.of(56, 518),
        patch_size=14,
        embed_dim=width,
        depth=scale.of(DEPTH, 12),
        num_heads=scale.of(2, 6),
        mlp_ratio=4,
        init_values=1.0,
        ffn_layer=ffn,
        block_chunks=chunks,
        num_register_tokens=registers,
        interpolate_antialias=bool(registers),
        interpolate_offset=0.0 if registers else 0.1,
    )
    lively(model)
    size = scale.of(28, 224)
    options = {"settings": {"size": str(size)}} if scale.tiny else {}
    if scale.tiny:
        options["settings"]["heads"] = "2"
    transform = imagenet(size, round(size * 256 / 224), "bicubic")
    state = model.state_dict()
    content: Any = (
        state if not chunks else {"teacher": prefixed("backbone.", state) | {"dino_head.last.weight": torch.ones(2, 2)}}
    )
    return Case("lightly-train's copy of DINOv2", saver(content), transform, model, model, options)


@case
def dinov2_plain(scale: Scale) -> Case:
    return dinov2(scale, 0, 0, "mlp")


@case
def dinov2_registers(scale: Scale) -> Case:
    return dinov2(scale, 4, 0, "mlp")


@case
def dinov2_chunked_swiglu(scale: Scale) -> Case:
    return dinov2(scale, 0, scale.of(1, 4), "swiglufused")
