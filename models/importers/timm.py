"""timm: ResNets and vision transformers, with the config.json beside the weights where there is one."""

from typing import Any

from models.importers import records
from models.importers.base import HALF, Checkpoint, Family, Found, Questions, imagenet
from models.importers.layouts import canonical

POOLS = {"token": "class", "avg": "mean", "map": "attention", "": "class"}


def claims(checkpoint: Checkpoint) -> bool:
    if records.is_timm(checkpoint.records.get("config.json")):
        return True
    tensors = checkpoint.state()
    return "patch_embed.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    available = ("online", "ema") if _ema(checkpoint) else ("online",)
    chosen = questions.which(available, available[-1])  # type: ignore[arg-type]
    found = canonical(checkpoint.state(ema=chosen == "ema"))
    found.weights = chosen
    config: Any = checkpoint.records.get("config.json") or {}
    name = str(config.get("architecture", ""))
    if found.kind == "vit":
        found.facts |= _vit(found, config, name)
        found.resample = {"antialias": True}
        found.preprocessing = imagenet(248, 224, "bicubic", mean=HALF, std=HALF)
        found.origin = "timm's usual one for vision transformers"
    else:
        found.preprocessing = imagenet()
        found.origin = "timm's for torchvision's weights"
    if records.is_timm(config):
        found.preprocessing = records.preprocessing(config, "config.json")
        found.origin = "config.json"
    return found


def _ema(checkpoint: Checkpoint) -> bool:
    return any(checkpoint.tensors(key) for key in ("state_dict_ema", "model_ema"))


def _vit(found: Found, config: Any, name: str) -> dict[str, Any]:
    """Facts that the architecture's name tells, if it is known; otherwise timm's usual ones."""
    clip = "norm_pre.weight" in found.tensors
    pool = "attention" if "attn_pool.latent" in found.tensors else found.facts.get("pool", "class")
    arguments = config.get("model_args") or {}
    given = arguments.get("global_pool", config.get("global_pool"))
    activation = "quick_gelu" if "quickgelu" in name else "gelu"
    tanh = "siglip2" in name or "so400m" in name or arguments.get("act_layer") == "gelu_tanh"
    facts: dict[str, Any] = {
        "usual_eps": 1e-5 if clip else 1e-6,
        "usual_activation": "gelu_tanh" if tanh else activation,
    }
    if name:
        facts |= {"eps": facts["usual_eps"], "activation": facts["usual_activation"]}
        heads = arguments.get("num_heads")
        facts |= {"heads": heads} if isinstance(heads, int) else {}
    if name or pool == "attention":
        facts["pool"] = POOLS.get(given, pool) if given in POOLS else pool
    return facts


FAMILY = Family("timm", "timm", claims, translate)
