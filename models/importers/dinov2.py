"""DINOv2: plain and with registers, published backbones and training checkpoints (blocks in chunks, a teacher)."""

from typing import Any

from models.importers.base import Checkpoint, Family, Found, Questions, Weights, imagenet, take
from models.importers.layouts import canonical

REASONS = {
    "dino_head.": "the projection head",
    "ibot_head.": "the projection head",
    "head.": "the projection head",
    "dino_loss.": "the loss",
    "ibot_patch_loss.": "the loss",
}


def claims(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors("teacher") or checkpoint.state()
    scaled = any(name.endswith(".ls1.gamma") for name in names)
    return (
        scaled
        and any(name.endswith("patch_embed.proj.weight") for name in names)
        and any("mask_token" in it for it in names)
    )


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = checkpoint.tensors("teacher") or checkpoint.state()
    chosen: Weights = "ema"
    if any(it.startswith(("teacher.", "student.")) for it in tensors):
        chosen = questions.which(("online", "ema"), "ema")
        tensors, outside = take(tensors, "teacher." if chosen == "ema" else "student.", {})
    else:
        outside = {}
    prefix = "backbone." if any(it.startswith("backbone.") for it in tensors) else ""
    kept, dropped = take(tensors, prefix, REASONS)
    found = canonical(kept)
    found.dropped |= dropped | outside
    found.weights = chosen
    found.facts |= {"pool": "class", "activation": "gelu", "eps": 1e-6}
    found.resample = rule(found)
    found.preprocessing = imagenet(256, 224, "bicubic")
    found.origin = "DINOv2's evaluation (256, 224, bicubic)"
    return found


def rule(found: Found) -> dict[str, Any]:
    """The rule for resampling positions: models with registers use antialiasing, and not the offset of 0.1."""
    return {"antialias": True} if "register_tokens" in found.tensors else {"offset": 0.1}


FAMILY = Family("dinov2", "DINOv2, plain and with registers", claims, translate)
