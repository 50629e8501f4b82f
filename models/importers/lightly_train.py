"""lightly-train's exported_last.pt: a bare encoder by its own package's names (--family lightly-train)."""

from models.importers import dinov2
from models.importers.base import Checkpoint, Family, Found, Questions, imagenet, take
from models.importers.layouts import canonical


def claims(checkpoint: Checkpoint) -> bool:
    """Return False: its files look like those of the packages whose models it trains, so --family must name it."""
    return False


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = checkpoint.state()
    prefix = next(
        (it for it in ("wrapped_model.", "_model.", "model.") if any(name.startswith(it) for name in tensors)), ""
    )
    kept, dropped = take(tensors, prefix, {})
    found = canonical(kept)
    found.dropped |= dropped
    found.resample = dinov2.rule(found) if "blocks.0.ls1.gamma" in found.tensors else {"antialias": True}
    found.facts |= {"activation": "gelu", "eps": 1e-6} if found.kind == "vit" else {}
    found.preprocessing = imagenet(224, 224, "bilinear", resize="squash", antialias=False)
    found.origin = "lightly-train's (squashed to 224, bilinear without antialiasing)"
    return found


FAMILY = Family("lightly-train", "lightly-train's exported models", claims, translate)
