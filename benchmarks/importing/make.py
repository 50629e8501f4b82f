# mypy: ignore-errors
"""Checkpoints of other libraries, with random weights, and what those libraries make of images with them.

Run by a Python of its own that has torchvision, timm, transformers, open_clip_torch, lightly and lightly-train (see
docs/measured/imports.md); nothing of this project is imported. Each case becomes a folder: the checkpoint as its
library (or, for FAIR's, as its published layout) writes it, `rows.npy` (n, d) float32 by the library's own forward pass
behind its own preprocessing, and `case.json`.

    python make.py --images DIR --out DIR             # published sizes
    python make.py --tiny --out DIR                   # tiny models and generated images: the fixtures of the tests
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

CASES: dict[str, Callable[["Scale"], "Case"]] = {}
DEPTH, BATCH = 2, 8
LARGE = ("timm_resnet50", "open_clip_siglip")  # that cannot be made tiny


@dataclass
class Case:
    """transform: a Pillow image -> the model's input; rows: inputs (n, c, s, s) -> (n, d)."""

    source: str
    write: Callable[[Path], None]
    transform: Callable[[Image.Image], Tensor]
    rows: Callable[[Tensor], Tensor]
    module: nn.Module
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    tiny: bool

    def of(self, small: int, published: int) -> int:
        return small if self.tiny else published


def case(function: Callable[[Scale], Case]) -> Callable[[Scale], Case]:
    CASES[function.__name__] = function
    return function


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which images get different rows, as after training; a fresh ViT maps all to one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif (
                tensor.ndim >= 2
                and "token" not in name
                and "pos" not in name
                and "embedding" not in name.rpartition(".")[0][-10:]
            ):
                fan = tensor[0].numel()
                tensor.copy_(normal(tensor, math.sqrt(2 / fan)))
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif "gamma" in name or "lambda" in name:
                tensor.copy_(0.2 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim:
                tensor.copy_(normal(tensor, 0.2))
    return module.eval()


def saver(content: Any, name: str = "checkpoint.pth", **records: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.save(content, folder / name)
        for record, value in records.items():
            (folder / f"{record}.json").write_text(json.dumps(value, indent=1))

    return write


def imagenet(size: int = 224, to: int = 256, interpolation: str = "bilinear") -> Callable[[Image.Image], Tensor]:
    from torchvision import transforms as T

    return T.Compose(
        [
            T.Resize(to, interpolation=T.InterpolationMode(interpolation)),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def projector(prefix: str, width: int) -> dict[str, Tensor]:
    return {
        f"{prefix}0.weight": torch.randn(8, width),
        f"{prefix}1.weight": torch.ones(8),
        f"{prefix}3.weight": torch.randn(8, 8),
    }


# ---- torchvision and the ResNets under its names


def resnet(
    scale: Scale, kind: str = "bottleneck", layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, **options: Any
) -> nn.Module:
    """torchvision's ResNet, at any width: `width` replaces its 64."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    class Widened(ResNet):
        def _make_layer(
            self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
        ) -> nn.Sequential:
            if planes == 64 and width != 64:
                self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
                self.bn1, self.inplanes = nn.BatchNorm2d(width), width
            return super()._make_layer(block, planes * width // 64, blocks, stride, dilate)

    model = Widened(Bottleneck if kind == "bottleneck" else BasicBlock, list(layers), **options)
    model.fc = nn.Identity()
    return lively(model)


def with_fc(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    width = state["layer4.0.bn2.weight"].shape[0]
    return {**state, "fc.weight": torch.randn(5, width), "fc.bias": torch.zeros(5)}


@case
def torchvision_resnet18(scale: Scale) -> Case:
    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    return Case("torchvision", saver(with_fc(model), "resnet18.pth"), imagenet(), model, model)


@case
def torchvision_resnet50(scale: Scale) -> Case:
    from torchvision.transforms._presets import ImageClassification

    model = resnet(scale, width=scale.of(2, 64))
    transform = ImageClassification(crop_size=224, resize_size=232)
    return Case(
        "torchvision", saver(with_fc(model), "resnet50-v2.pth"), transform, model, model, {"settings": {"to": "232"}}
    )


@case
def torchvision_resnext50_32x4d(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(8, 64), groups=scale.of(2, 32), width_per_group=scale.of(64, 4))
    return Case("torchvision", saver(with_fc(model)), imagenet(), model, model)


@case
def torchvision_wide_resnet50_2(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64), width_per_group=128)
    return Case("torchvision", saver(with_fc(model)), imagenet(), model, model)


@case
def torchvision_vit_b_16(scale: Scale) -> Case:
    from torchvision.models import VisionTransformer

    size, width = scale.of(32, 224), scale.of(16, 768)
    model = VisionTransformer(
        image_size=size,
        patch_size=16,
        num_layers=scale.of(2, 12),
        num_heads=max(1, width // 64),
        hidden_dim=width,
        mlp_dim=width * 2,
    )
    lively(model)
    state = model.state_dict()
    model.heads = nn.Identity()
    return Case("torchvision", saver(state), imagenet(size, round(size * 256 / 224)), model, model)


@case
def fair_barlow_twins(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    state = prefixed("module.backbone.", model.state_dict()) | projector("module.projector.", 32)
    state |= {"module.bn.running_mean": torch.zeros(8)}
    write = saver({"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": []}})
    return Case("torchvision (layout: Barlow Twins)", write, imagenet(), model, model)


@case
def fair_vicreg_resnet50x2(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(8, 128))
    return Case(
        "torchvision (layout: VICReg x2)", saver(model.state_dict(), "resnet50x2.pth"), imagenet(), model, model
    )


@case
def fair_directclr(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    write = saver({"backbone": model.state_dict(), "head": {"weight": torch.randn(5, 8)}})
    return Case("torchvision (layout: DirectCLR)", write, imagenet(), model, model)


@case
def simsiam(scale: Scale) -> Case:
    model = resnet(scale, width=scale.of(2, 64))
    state = (
        prefixed("module.encoder.", model.state_dict())
        | projector("module.encoder.fc.", 32)
        | projector("module.predictor.", 8)
    )
    write = saver({"epoch": 1, "arch": "resnet50", "state_dict": state, "optimizer": {}}, "checkpoint_0099.pth.tar")
    return Case("torchvision (layout: SimSiam)", write, imagenet(), model, model)


@case
def moco_v2(scale: Scale) -> Case:
    model, other = resnet(scale, width=scale.of(2, 64)), resnet(scale, width=scale.of(2, 64))
    state = prefixed("module.encoder_q.", model.state_dict()) | projector("module.encoder_q.fc.", 32)
    state |= prefixed("module.encoder_k.", other.state_dict()) | {
        "module.queue": torch.randn(4, 4),
        "module.queue_ptr": torch.zeros(1),
    }
    write = saver({"epoch": 1, "arch": "resnet50", "state_dict": state}, "moco_v2_800ep_pretrain.pth.tar")
    return Case("torchvision (layout: MoCo v2)", write, imagenet(), model, model)


@case
def luckmatters(scale: Scale) -> Case:
    from torchvision import transforms as T

    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model.conv1 = nn.Conv2d(3, scale.of(4, 64), 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    lively(model)
    content = {
        "online_network_state_dict": prefixed("encoder.", model.state_dict()) | projector("projetion.net.", 32),
        "target_network_state_dict": prefixed("encoder.", model.state_dict()),
        "predictor_state_dict": projector("layer.", 8),
        "optimizer_state_dict": {},
    }
    transform = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor()])
    return Case("torchvision (layout: luckmatters)", saver(content), transform, model, model)


@case
def solo_learn_cifar(scale: Scale) -> Case:
    from torchvision import transforms as T

    model = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model.conv1 = nn.Conv2d(3, scale.of(4, 64), 3, 1, 2, bias=False)
    model.maxpool = nn.Identity()
    lively(model)
    state = (
        prefixed("backbone.", model.state_dict())
        | projector("projector.", 32)
        | {"classifier.weight": torch.randn(5, 8)}
    )
    state |= prefixed("momentum_backbone.", model.state_dict())
    transform = T.Compose(
        [T.Resize(32), T.CenterCrop(32), T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
    )
    write = saver({"epoch": 1, "state_dict": state, "pytorch-lightning_version": "2.1"}, "byol.ckpt")
    return Case("torchvision (layout: solo-learn)", write, transform, model, model)


# ---- vision transformers by FAIR's layouts, on timm's


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


# ---- timm


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


# ---- Hugging Face


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


# ---- open_clip


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


# ---- lightly


@case
def lightly_example(scale: Scale) -> Case:
    from lightly.models.modules import SimCLRProjectionHead

    whole = resnet(scale, "basic", (2, 2, 2, 2), scale.of(4, 64))
    model = nn.Sequential(*list(whole.children())[:-1])
    head = SimCLRProjectionHead(scale.of(32, 512), 16, 8)
    state = prefixed("backbone.", model.state_dict()) | prefixed("projection_head.", head.state_dict())
    write = saver({"state_dict": state, "pytorch-lightning_version": "2.1"}, "simclr.ckpt")
    return Case("lightly", write, imagenet(), lambda x: model(x).flatten(1), model)


@case
def lightly_cifar(scale: Scale) -> Case:
    from lightly.models import ResNetGenerator

    whole = ResNetGenerator("resnet-18", width=scale.of(1, 16) / 16, num_splits=2)
    model = nn.Sequential(*list(whole.children())[:-1], nn.AdaptiveAvgPool2d(1))
    lively(model)
    model.train()
    model.eval()
    state = prefixed("backbone.", {k: v.clone() for k, v in model.state_dict().items()}) | projector(
        "projection_head.", 16
    )
    return Case("lightly", saver({"state_dict": state}), imagenet(32, 32), lambda x: model(x).flatten(1), model)


@case
def lightly_train_dinov2(scale: Scale) -> Case:
    made = dinov2(scale, 0, 0, "mlp")
    size = scale.of(28, 224)

    def transform(image: Image.Image) -> Tensor:
        import albumentations as A

        steps = A.Compose([A.Resize(size, size), A.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
        return torch.from_numpy(steps(image=np.asarray(image.convert("RGB")))["image"].transpose(2, 0, 1))

    made.transform, made.source = transform, "lightly-train"
    made.options = {"family": "lightly-train", "settings": {"size": str(size)} | ({"heads": "2"} if scale.tiny else {})}
    made.write = saver(made.module.state_dict(), "exported_last.pt")
    return made


# ---- images and the whole


def generated(folder: Path) -> list[Path]:
    """Images with detail at every scale, of many shapes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, size in enumerate([(61, 47), (40, 90), (64, 64), (33, 35), (120, 50), (80, 81)]):
        total = np.zeros((size[1], size[0], 3))
        for cells in (2, 4, 8, 16, 32):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            total += (np.asarray(small.resize(size, Image.Resampling.BICUBIC)) - 127.5) * (2 / cells**0.7)
        paths.append(folder / f"{index}.png")
        Image.fromarray((127.5 + total / 2).clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


@torch.inference_mode()
def make(name: str, scale: Scale, images: list[Path], out: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    made = CASES[name](scale)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made.write(folder)
    opened = [Image.open(path).convert("RGB") for path in images]
    inputs = torch.stack([made.transform(image) for image in opened])
    rows = torch.cat([made.rows(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH)])
    np.save(folder / "rows.npy", rows.float().numpy())
    library = made.source.partition(" ")[0].partition("'")[0]
    versions = {
        "torchvision": "torchvision",
        "timm": "timm",
        "transformers": "transformers",
        "open_clip": "open_clip_torch",
    }
    versions |= {"lightly": "lightly", "lightly-train": "lightly-train"}
    from importlib.metadata import version

    record = {"source": made.source, "version": version(versions[library]), **made.options}
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; generated ones if absent")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    options = parser.parse_args()
    if options.images is None:
        images = generated(options.out / "images")
    else:
        images = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        images = images[:: max(1, len(images) // options.limit)][: options.limit]
        (options.out / "images.json").write_text(json.dumps([str(path) for path in images]))
    failed = 0
    for name in options.only:
        if options.tiny and name in LARGE:
            continue
        try:
            print(name, make(name, Scale(options.tiny), images, options.out), flush=True)
        except Exception as error:  # one library's trouble is not the others'
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
