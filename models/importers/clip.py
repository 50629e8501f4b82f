"""OpenAI's CLIP and open_clip: the vision tower, a vision transformer of theirs or of timm's."""

from typing import Any

from models.importers import records
from models.importers.base import Checkpoint, Family, Found, ImportRefusedError, Questions, imagenet, take
from models.importers.layouts import canonical

REASONS = {
    "transformer.": "the text tower",
    "token_embedding": "the text tower",
    "positional_embedding": "the text tower",
    "ln_final": "the text tower",
    "text": "the text tower",
    "attn_mask": "the text tower",
    "logit_": "the contrastive loss's scale",
    "input_resolution": "a number",
    "context_length": "a number",
    "vocab_size": "a number",
}


def claims(checkpoint: Checkpoint) -> bool:
    return any(name.startswith("visual.") for name in checkpoint.state())


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = checkpoint.state()
    trunk = any(name.startswith("visual.trunk.") for name in tensors)
    if "visual.layer1.0.conv1.weight" in tensors:
        raise ImportRefusedError(
            "this tower is CLIP's own ResNet with attention pooling; export it to ONNX and import that"
        )
    inside = {name: it for name, it in tensors.items() if name.startswith("visual.")}
    dropped = {
        name: next((why for part, why in REASONS.items() if name.startswith(part)), "not of the vision tower")
        for name in tensors
        if name not in inside
    }
    kept, _ = take(inside, "visual.trunk." if trunk else "visual.")
    projection = tensors.get("visual.head.proj.weight")
    unread = [it for it in inside if trunk and not it.startswith("visual.trunk.") and it != "visual.head.proj.weight"]
    if unread:
        raise ImportRefusedError(f"the tower's head has more than one linear layer ({unread[0]}); export it to ONNX")
    found = canonical(kept)
    if projection is not None:
        found.tensors["proj.weight"] = projection
    found.dropped |= dropped
    config: Any = checkpoint.records.get("open_clip_config.json")
    found.facts |= _facts(found, config or {}, trunk)
    found.resample = {"antialias": True}
    found.preprocessing = imagenet(224, 224, "bicubic", mean=records.OPENAI_MEAN, std=records.OPENAI_STD)
    found.origin = "OpenAI's (224, bicubic)"
    if config is not None:
        found.preprocessing, found.origin = (
            records.preprocessing(config, "open_clip_config.json"),
            "open_clip_config.json",
        )
    return found


def _facts(found: Found, config: Any, trunk: bool) -> dict[str, Any]:
    model = config.get("model_cfg", {})
    tower = model.get("vision_cfg", {})
    facts: dict[str, Any] = {
        "usual_activation": "gelu" if trunk else "quick_gelu",
        "usual_eps": 1e-6 if trunk else 1e-5,
    }
    if trunk:
        name = str(tower.get("timm_model_name", ""))
        if "siglip2" in name or "so400m" in name:
            facts["usual_activation"] = "gelu_tanh"
        facts["pool"] = "attention" if "attn_pool.latent" in found.tensors else found.facts.get("pool", "class")
        pool = {"avg": "mean", "token": "class", "map": "attention"}.get(str(tower.get("timm_pool")))
        facts |= {"pool": pool} if pool else {}
        return facts
    facts["pool"] = "mean" if tower.get("pool_type", "tok") == "avg" else "class"
    facts["eps"] = float((tower.get("norm_kwargs") or {}).get("eps", 1e-5))
    width = found.tensors["patch_embed.proj.weight"].shape[0]
    facts["usual_heads"] = width // int(tower.get("head_width", 64))
    if config:
        facts["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
        facts["heads"] = facts["usual_heads"]
    if tower.get("attentional_pool"):
        raise ImportRefusedError(
            "the tower pools by attention of open_clip's own kind; export it to ONNX and import that"
        )
    if tower.get("final_ln_after_pool"):
        facts["final_norm"] = "pooled"
    return facts


FAMILY = Family("open_clip", "OpenAI's CLIP and open_clip", claims, translate)
