"""MoCo: versions 1 and 2 (ResNets, query and key encoder) and 3 (ResNets and vision transformers, momentum encoder)."""

from models.importers.base import Checkpoint, Family, Found, Questions, Weights, imagenet, take
from models.importers.layouts import canonical

DROPPED = {
    "queue": "the queue of negatives",
    "predictor.": "the predictor",
    "fc.": "the projector",
    "head.": "the projector",
}
PREFIXES: dict[str, tuple[str, str]] = {"2": ("encoder_q.", "encoder_k."), "3": ("base_encoder.", "momentum_encoder.")}


def _version(checkpoint: Checkpoint) -> str:
    names = checkpoint.state()
    return next((v for v, (online, _) in PREFIXES.items() if any(it.startswith(online) for it in names)), "")


def claims(checkpoint: Checkpoint) -> bool:
    return bool(_version(checkpoint))


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    version = _version(checkpoint) or "2"
    online, momentum = PREFIXES[version]
    tensors = checkpoint.state()
    both: tuple[Weights, ...] = ("online", "ema") if any(it.startswith(momentum) for it in tensors) else ("online",)
    chosen = questions.which(both, "online")
    prefix = online if chosen == "online" else momentum
    other = momentum if chosen == "online" else online
    kept, dropped = take(
        tensors, prefix, DROPPED | {other: f"the {'momentum' if chosen == 'online' else 'online'} encoder"}
    )
    found = canonical(kept)
    found.dropped |= dropped
    found.weights = chosen
    found.preprocessing = imagenet()
    found.origin = "MoCo's evaluation (256, 224, bilinear)"
    if found.kind == "vit":
        # MoCo v3's small ViT has twelve heads of 32, where others have six of 64; positions are fixed sines.
        found.facts |= {"usual_heads": 12 if found.tensors["patch_embed.proj.weight"].shape[0] == 384 else 0}
        found.facts |= {"pool": "class", "activation": "gelu", "eps": 1e-6}
    return found


FAMILY = Family("moco", "MoCo v1, v2, v3", claims, translate)
