# mypy: ignore-errors
"""transformers: as save_pretrained writes a model and its processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases.common import DEPTH, Case, Scale, case, lively
from PIL import Image
from torch import Tensor, nn


def by_hf(model: nn.Module, processor: Any, rows: Callable[[Tensor], Tensor]) -> Case:
    lively(model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    def transform(image: Image.Image) -> Tensor:
        return torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))

    return Case("transformers", write, transform, rows, model)


def hf_sizes(scale: Scale) -> dict[str, Any]:
    width = scale.of(16, 384)
    return {
        "hidden_size": width,
        "num_hidden_layers": scale.of(DEPTH, 12),
        "num_attention_heads": scale.of(2, 6),
        "intermediate_size": 4 * width,
    }


@case
def hf_resnet(scale: Scale) -> Case:
    import transformers as hf
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    sizes: dict[str, Any] = {}
    if scale.tiny:
        sizes = {"depths": [2, 2, 2, 2], "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 8, 16, 32]}
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)
    return by_hf(model, processor, lambda x: model.resnet(x).pooler_output.flatten(1))


@case
def hf_vit(scale: Scale) -> Case:
    import transformers as hf
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    size = scale.of(32, 224)
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=size, patch_size=16, **hf_sizes(scale)))
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    return by_hf(model, processor, lambda x: model.vit(x).last_hidden_state[:, 0])


def hf_dino(scale: Scale, registers: bool) -> Case:
    import transformers as hf
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    sizes = hf_sizes(scale)
    del sizes["intermediate_size"]
    native, size = scale.of(56, 518), scale.of(28, 224)
    config, kind = (
        (hf.Dinov2WithRegistersConfig, hf.Dinov2WithRegistersModel) if registers else (hf.Dinov2Config, hf.Dinov2Model)
    )
    model = kind(config(image_size=native, patch_size=14, use_swiglu_ffn=not registers, **sizes))
    processor = BitImageProcessorPil(
        size={"shortest_edge": round(size * 256 / 224)},
        crop_size={"height": size, "width": size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return by_hf(model, processor, lambda x: model(x).pooler_output)


@case
def hf_dinov2_swiglu(scale: Scale) -> Case:
    return hf_dino(scale, False)


@case
def hf_dinov2_registers(scale: Scale) -> Case:
    return hf_dino(scale, True)


@case
def hf_clip_vision(scale: Scale) -> Case:
    import transformers as hf
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = scale.of(32, 224)
    model = hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(image_size=size, patch_size=16, projection_dim=scale.of(24, 512), **hf_sizes(scale))
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return by_hf(model, processor, lambda x: model(x).image_embeds)


@case
def hf_siglip_vision(scale: Scale) -> Case:
    import transformers as hf
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = scale.of(32, 224)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(image_size=size, patch_size=16, **hf_sizes(scale)))
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    return by_hf(model, processor, lambda x: model(x).pooler_output)
