"""Hugging Face: ResNet, ViT, DINOv2, CLIP's and SigLIP's vision towers, with config.json where it lies beside them."""

from typing import Any

from models.importers import records
from models.importers.base import (
    HALF,
    Checkpoint,
    Family,
    Found,
    ImportRefusedError,
    Questions,
    Tensors,
    imagenet,
    take,
)
from models.importers.layouts import canonical
from models.preprocess import Preprocessing

PREFIXES = ("vision_model.", "vit.", "dinov2.", "dinov2_with_registers.", "resnet.", "model.vision_model.", "model.")
MARKS = (
    "embedder.embedder.convolution.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.weight",
)
REASONS = {
    "text_model.": "the text tower",
    "text_projection": "the text tower",
    "logit_": "the contrastive loss's scale",
    "classifier": "the classifier",
    "decoder.": "the decoder",
    "vision_model.embeddings.position_ids": "a list of numbers",
    "embeddings.position_ids": "a list of numbers",
}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
MODELS: tuple[str, ...] = (
    "resnet",
    "vit",
    "vit_mae",
    "vit_msn",
    "dinov2",
    "dinov2_with_registers",
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
)


def prefix_of(tensors: Tensors) -> str | None:
    return next((it for it in ("", *PREFIXES) if any(it + mark in tensors for mark in MARKS)), None)


def bare(tensors: Tensors) -> Tensors:
    """The tensors without Hugging Face's prefix, if they have one."""
    prefix = prefix_of(tensors)
    return take(tensors, prefix)[0] if prefix else tensors


def claims(checkpoint: Checkpoint) -> bool:
    return prefix_of(checkpoint.state()) is not None


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = checkpoint.state()
    prefix = prefix_of(tensors)
    if prefix is None:
        raise ImportRefusedError("it has no patch embedding or stem by Hugging Face's names")
    projection = tensors.pop("visual_projection.weight", None)
    kept, dropped = take(tensors, prefix, REASONS)
    if projection is not None:
        kept["visual_projection.weight"] = projection
    found = canonical(kept)
    found.dropped |= dropped
    config = checkpoint.records.get("config.json") or {}
    if "vision_config" in config:
        config = config["vision_config"] | {"model_type": config.get("model_type")}
    kind = str(config.get("model_type") or _kind(found))
    if kind not in MODELS:
        raise ImportRefusedError(
            f"model_type {kind!r} is none of {', '.join(MODELS)}; export it to ONNX and import that"
        )
    found.facts |= _facts(found, config, kind)
    found.resample = {"antialias": True} if kind == "dinov2_with_registers" else {}
    if "preprocessor_config.json" in checkpoint.records:
        found.origin = "preprocessor_config.json"
        found.preprocessing = records.preprocessing(checkpoint.records[found.origin], found.origin)
    else:
        found.preprocessing = _usual(kind)
        found.origin = f"transformers' default for {kind}"
    return found


def _kind(found: Found) -> str:
    """The model type, read from the tensors' names if there is no config."""
    names = found.tensors
    if found.kind == "resnet":
        return "resnet"
    if "norm_pre.weight" in names:
        return "clip"
    if "attn_pool.latent" in names or "cls_token" not in names:
        return "siglip"
    if "blocks.0.ls1.gamma" in names:
        return "dinov2_with_registers" if "register_tokens" in names else "dinov2"
    return "vit"


def _facts(found: Found, config: Any, kind: str) -> dict[str, Any]:
    if found.kind == "resnet":
        return {"stride_first": bool(config.get("downsample_in_bottleneck", False))}
    eps = {"vit": 1e-12, "vit_mae": 1e-12, "vit_msn": 1e-6, "clip": 1e-5, "clip_vision_model": 1e-5}.get(kind, 1e-6)
    usual = "quick_gelu" if "clip" in kind and "siglip" not in kind else "gelu_tanh" if "siglip" in kind else "gelu"
    facts: dict[str, Any] = {"usual_eps": eps, "usual_activation": usual}
    if kind != "vit_mae":
        facts["pool"] = "attention" if "attn_pool.latent" in found.tensors else "mean" if "siglip" in kind else "class"
    if config:
        act = str(
            config.get("hidden_act", {"quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}.get(usual, "gelu"))
        )
        if act not in ACTIVATIONS:
            raise ImportRefusedError(f"hidden_act {act!r} is none of {', '.join(ACTIVATIONS)}")
        default_heads = 12
        facts |= {"eps": float(config.get("layer_norm_eps", eps)), "activation": ACTIVATIONS[act]}
        facts["heads"] = int(config.get("num_attention_heads", default_heads))
    return facts


def _usual(kind: str) -> Preprocessing:
    if "siglip" in kind:
        return imagenet(224, 224, "bicubic", mean=HALF, std=HALF, resize="squash", centre="floor")
    if "clip" in kind:
        return imagenet(224, 224, "bicubic", mean=records.OPENAI_MEAN, std=records.OPENAI_STD, centre="floor")
    if kind.startswith("dinov2"):
        return imagenet(256, 224, "bicubic", centre="floor")
    if kind == "resnet":
        return imagenet(256, 224, "bicubic", centre="floor")
    mean = {} if kind == "vit_mae" else {"mean": HALF, "std": HALF}
    return imagenet(224, 224, "bilinear", resize="squash", centre="floor", **mean)


FAMILY = Family("huggingface", "Hugging Face transformers", claims, translate)
