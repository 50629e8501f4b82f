# mypy: ignore-errors
"""Layouts of FAIR's DINO, MoCo v3 and MAE around timm's vision transformers."""

from typing import Any

import torch
from cases.common import DEPTH, Case, Scale, case, imagenet, lively, prefixed, projector, saver
from torch import nn


def timm_vit(scale: Scale, width: int, heads: int, size: int = 224, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=size,
        patch_size=16,
        embed_dim=width,
        depth=scale.of(DEPTH, 12),
        num_heads=heads,
        num_classes=0,
        **options,
    )
    return lively(model)


@case
def dino_v1(scale: Scale) -> Case:
    size = scale.of(32, 224)
    model = timm_vit(scale, scale.of(16, 384), scale.of(1, 6), size)
    teacher = prefixed("module.backbone.", model.state_dict()) | projector("module.head.mlp.", 64)
    content = {"student": teacher, "teacher": {k.replace("module.", "", 1): v for k, v in teacher.items()}, "epoch": 1}
    transform = imagenet(size, round(size * 256 / 224), "bicubic")
    return Case("timm (layout: DINO)", saver(content), transform, model, model)


@case
def moco_v3(scale: Scale) -> Case:
    size = scale.of(32, 224)
    model = timm_vit(scale, 384, 12, size) if not scale.tiny else timm_vit(scale, 24, 12, size)
    state = prefixed("module.base_encoder.", model.state_dict()) | projector("module.base_encoder.head.", 8)
    state |= prefixed("module.momentum_encoder.", model.state_dict()) | projector("module.predictor.", 8)
    options = {"settings": {"heads": "12"}} if scale.tiny else {}
    return Case(
        "timm (layout: MoCo v3)",
        saver({"arch": "vit_small", "state_dict": state}),
        imagenet(size, round(size * 256 / 224)),
        model,
        model,
        options,
    )


@case
def mae(scale: Scale) -> Case:
    size = scale.of(32, 224)
    model = timm_vit(scale, scale.of(16, 768), scale.of(1, 12), size)
    state = model.state_dict() | {
        "mask_token": torch.randn(1, 1, 8),
        "decoder_pos_embed": torch.randn(1, 5, 8),
        "decoder_embed.weight": torch.randn(8, 8),
    }
    return Case(
        "timm (layout: MAE)", saver({"model": state}), imagenet(size, round(size * 256 / 224), "bicubic"), model, model
    )
