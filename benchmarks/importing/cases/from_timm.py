# mypy: ignore-errors
"""timm: as save_for_hf writes a model."""

from pathlib import Path
from typing import Any

from cases.common import Case, Scale, case, lively
from torch import Tensor


def by_timm(name: str, **options: Any) -> Case:
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import save_for_hf

    if "img_size" in options:
        size = options["img_size"]
        options["pretrained_cfg_overlay"] = {"input_size": (3, size, size)}
    model = lively(timm.create_model(name, **options))

    def write(folder: Path) -> None:
        save_for_hf(model, folder, safe_serialization=True)

    transform = create_transform(**resolve_model_data_config(model), is_training=False)

    def rows(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True)

    return Case("timm", write, transform, rows, model, {})


@case
def timm_resnet50(scale: Scale) -> Case:
    return by_timm("resnet50.a1_in1k")


@case
def timm_vit_tiny(scale: Scale) -> Case:
    if scale.tiny:
        return by_timm("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    return by_timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k")


@case
def timm_vit_avg(scale: Scale) -> Case:
    if scale.tiny:
        return by_timm(
            "vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool="avg"
        )
    return by_timm("vit_small_patch16_224", global_pool="avg", num_classes=0)


@case
def timm_dinov2_registers(scale: Scale) -> Case:
    if scale.tiny:
        return by_timm("vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=16, depth=2, num_heads=2)
    return by_timm("vit_small_patch14_reg4_dinov2.lvd142m", img_size=224)


@case
def timm_siglip(scale: Scale) -> Case:
    if scale.tiny:
        return by_timm("vit_base_patch16_siglip_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    return by_timm("vit_base_patch16_siglip_224.webli")


@case
def timm_clip_quickgelu(scale: Scale) -> Case:
    if scale.tiny:
        return by_timm("vit_base_patch16_clip_quickgelu_224", img_size=32, embed_dim=16, depth=2, num_heads=1)
    return by_timm("vit_base_patch16_clip_quickgelu_224")
