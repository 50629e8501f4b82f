"""DINO: student and teacher, a ResNet or a vision transformer; also its bare backbones (--family dino)."""

from models.importers.base import Checkpoint, Family, Found, Questions, Weights, imagenet, take
from models.importers.layouts import canonical

PARTS: dict[Weights, str] = {"online": "student", "ema": "teacher"}


def claims(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors("teacher")
    return any(it in names for it in ("backbone.conv1.weight", "backbone.patch_embed.proj.weight")) and not _second(
        names
    )


def _second(names: object) -> bool:
    """Whether these are DINOv2's names: it has layer scale, DINO has not."""
    return any(".ls1." in str(it) for it in names)  # type: ignore[attr-defined]


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    available = tuple(key for key, part in PARTS.items() if checkpoint.tensors(part))
    if available:
        chosen = questions.which(available, "ema" if "ema" in available else "online")
        kept, dropped = take(checkpoint.tensors(PARTS[chosen]), "backbone.", {"head.": "the projection head"})
    else:
        chosen = questions.which(("ema",), "ema")
        kept, dropped = take(checkpoint.state(), "", {"head.": "the projection head"})
    found = canonical(kept)
    found.dropped |= dropped
    found.weights = chosen
    found.facts |= {"pool": "class", "activation": "gelu", "eps": 1e-6} if found.kind == "vit" else {}
    found.resample = {"offset": 0.1}
    found.preprocessing = imagenet(256, 224, "bicubic")
    found.origin = "DINO's evaluation (256, 224, bicubic)"
    return found


FAMILY = Family("dino", "DINO", claims, translate)
