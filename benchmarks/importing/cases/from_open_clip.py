# mypy: ignore-errors
"""open_clip: its CLIP models, of which the image tower is used."""

from typing import Any

from cases.common import DEPTH, Case, Scale, case, lively, prefixed, saver


def by_open_clip(model: Any, config: dict[str, Any], preprocess: dict[str, Any]) -> Case:
    from open_clip.transform import image_transform

    lively(model)
    transform = image_transform(
        preprocess["size"],
        is_train=False,
        mean=preprocess.get("mean"),
        std=preprocess.get("std"),
        resize_mode=preprocess.get("resize_mode"),
        interpolation=preprocess.get("interpolation"),
    )
    record = {"model_cfg": config, "preprocess_cfg": preprocess}
    write = saver(
        {"state_dict": prefixed("module.", model.state_dict())}, "open_clip_pytorch_model.bin", open_clip_config=record
    )
    return Case("open_clip", write, transform, model.encode_image, model)


def open_clip_model(scale: Scale, quick: bool) -> Case:
    from open_clip.model import CLIP

    size, width = scale.of(32, 224), scale.of(16, 768)
    vision = {
        "image_size": size,
        "layers": scale.of(DEPTH, 12),
        "width": width,
        "patch_size": 16,
        "head_width": scale.of(8, 64),
    }
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(embed_dim=scale.of(24, 512), vision_cfg=vision, text_cfg=text, quick_gelu=quick)
    config = {"embed_dim": scale.of(24, 512), "vision_cfg": vision, "quick_gelu": quick}
    return by_open_clip(
        model, config, {"size": size, "resize_mode": "longest" if quick else "shortest", "interpolation": "bicubic"}
    )


@case
def open_clip_vit(scale: Scale) -> Case:
    return open_clip_model(scale, False)


@case
def open_clip_vit_quickgelu_padded(scale: Scale) -> Case:
    return open_clip_model(scale, True)


@case
def open_clip_siglip(scale: Scale) -> Case:
    from open_clip.model import CLIP

    size = 224
    vision = {
        "image_size": size,
        "timm_model_name": "vit_tiny_patch16_224" if scale.tiny else "vit_base_patch16_siglip_224",
    }
    vision |= {
        "timm_model_pretrained": False,
        "timm_pool": "avg" if scale.tiny else "map",
        "timm_proj": "linear" if scale.tiny else "none",
    }
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    embed = 24 if scale.tiny else 768
    model = CLIP(embed_dim=embed, vision_cfg=vision, text_cfg=text)
    preprocess = {
        "size": size,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    return by_open_clip(model, {"embed_dim": embed, "vision_cfg": vision}, preprocess)
