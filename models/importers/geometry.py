"""Reads an encoder's geometry (depth, width, patch and so on) from the names and shapes of its tensors."""

import re
from typing import Any, get_args

from torch import Tensor

from models.artifact import Architecture, ViTArchitecture
from models.backbones.resnet import LAYOUTS, BasicBlock, Stem
from models.backbones.vit import Activation, Pool, resampled
from models.importers.base import Found, ImportRefusedError, Questions, Tensors
from models.importers.layouts import shape

ELSE = "anything else comes through ONNX: export it and import the .onnx file"
POOLS = {"cls": "class", "class": "class", "mean": "mean", "avg": "mean", "cls+mean": "class+mean"}
POOLS |= {"class+mean": "class+mean", "attention": "attention", "map": "attention"}


def resnet(found: Found, questions: Questions) -> Architecture:
    """The architecture of the ResNet with these tensors. Raises ImportRefusedError for another kind of network."""
    tensors = found.tensors
    if questions.pool not in (None, "mean", "avg"):
        raise ImportRefusedError(f"--pool {questions.pool}: a ResNet's representation is the mean over positions")
    if "conv1.0.weight" in tensors:
        raise ImportRefusedError(f"this ResNet has a stem of several convolutions; {ELSE}")
    width, channels, kernel, _ = shape(tensors, "conv1.weight")
    if channels not in (1, 3):
        raise ImportRefusedError(f"its first convolution takes {channels} channels; 1 or 3 are supported")
    depths = tuple(
        len({match[1] for name in tensors if (match := re.match(rf"layer{stage}\.(\d+)\.", name))})
        for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in tensors
    names = [
        name
        for name, (block, layout) in LAYOUTS.items()
        if layout == depths and (block is not BasicBlock) == bottleneck
    ]
    if not names:
        raise ImportRefusedError(f"a ResNet of {depths} blocks is none of {', '.join(LAYOUTS)}; {ELSE}")
    stem = found.facts.get("stem", "7x7")
    if kernel == 3:
        stem = questions.ask(
            "stem", found.facts.get("small_stem", "3x3"), tuple(it for it in get_args(Stem) if it != "7x7")
        )
    elif kernel != 7:
        raise ImportRefusedError(f"its first convolution is {kernel} x {kernel}; 3 x 3 and 7 x 7 are supported; {ELSE}")
    values: dict[str, Any] = {"name": names[0], "width": width, "in_channels": channels, "stem": stem}
    values["stem_relu"] = bool(found.facts.get("stem_relu", True))
    if bottleneck:
        inner = shape(tensors, "layer1.0.conv1.weight")[0]
        planes = shape(tensors, "layer1.0.conv3.weight")[0] // 4
        values["wide"] = max(1, inner // max(planes, 1))
        values["groups"] = max(1, inner // max(shape(tensors, "layer1.0.conv2.weight")[1], 1))
        values["stride_first"] = bool(found.facts.get("stride_first", False))
    made: Architecture = checked(Architecture, values)
    return made


def vit(found: Found, questions: Questions, size: int) -> ViTArchitecture:
    """The architecture of the ViT with these tensors, for images of `size` pixels, with the pooling asked for."""
    tensors, facts = found.tensors, found.facts
    width, channels, *patch = shape(tensors, "patch_embed.proj.weight")
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ImportRefusedError(f"its patches are {' x '.join(map(str, patch))}; square ones are supported; {ELSE}")
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not blocks:
        raise ImportRefusedError("it has no blocks: this is no whole encoder")
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    hidden = shape(tensors, "blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight")[0]
    pool = POOLS.get(questions.pool or "", questions.pool) or _pool(found, questions)
    if pool not in get_args(Pool):
        raise ImportRefusedError(f"--pool {questions.pool}: choose one of cls, mean, cls+mean, attention")
    _fit(found, pool)
    activation = facts.get("activation") if "activation" in facts else None
    if swiglu:
        activation = "swiglu"
    elif activation is None:
        choices = tuple(it for it in get_args(Activation) if it != "swiglu")
        activation = questions.ask("activation", facts.get("usual_activation", "gelu"), choices)
    heads = (
        facts["heads"] if "heads" in facts else questions.ask("heads", facts.get("usual_heads") or max(1, width // 64))
    )
    eps = facts["eps"] if "eps" in facts else questions.ask("eps", facts.get("usual_eps", 1e-6))
    values: dict[str, Any] = {
        "size": size,
        "patch": patch[0],
        "width": width,
        "depth": max(blocks) + 1,
        "heads": heads,
        "hidden": hidden // 2 if swiglu else hidden,
        "in_channels": channels,
        "class_token": "cls_token" in tensors,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "activation": activation,
        "patch_bias": "patch_embed.proj.bias" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "pre_norm": "norm_pre.weight" in tensors,
        "final_norm": facts.get("final_norm", "tokens") if "norm.weight" in tensors else "none",
        "eps": eps,
        "pool": pool,
        "projection": tensors["proj.weight"].shape[0] if "proj.weight" in tensors else 0,
    }
    made: ViTArchitecture = checked(ViTArchitecture, values)
    return made


def _pool(found: Found, questions: Questions) -> str:
    """The pooling that the user asks for, or the family's, which is noted as assumed."""
    default = found.facts.get("pool") or ("class" if "cls_token" in found.tensors else "mean")
    if "pool" not in found.facts:
        questions.assumed["pool"] = f"{default} (--pool chooses)"
    return str(default)


def _fit(found: Found, pool: str) -> None:
    """Leave out the tensors of a pooling that is not used."""
    usual = found.facts.get("pool", pool)
    parts = ["attn_pool."] if pool != "attention" else []
    parts += ["proj."] if pool != usual else []
    for name in [it for it in found.tensors if it.startswith(tuple(parts))] if parts else []:
        found.dropped[name] = f"belongs to another pooling than {pool}"
        del found.tensors[name]
    if pool == "attention" and "attn_pool.latent" not in found.tensors:
        raise ImportRefusedError("--pool attention: this checkpoint has no attention pooling")


def checked(kind: type[Any], values: dict[str, Any]) -> Any:
    """Build the architecture. Raises ImportRefusedError, which names the invalid values."""
    try:
        return kind.model_validate(values)
    except ValueError as error:
        reasons = [f"{'.'.join(map(str, it['loc'])) or 'geometry'}: {it['msg']}" for it in error.errors()]  # type: ignore[attr-defined]
        raise ImportRefusedError(f"no such encoder can be built here: {'; '.join(reasons)}; {ELSE}") from error


def native_size(tensors: Tensors) -> int:
    """The image size in pixels for which a vision transformer's positions were trained."""
    side = round(shape(tensors, "pos_embed")[1] ** 0.5)
    return int(side * shape(tensors, "patch_embed.proj.weight")[-1])


def resampled_positions(found: Found, size: int, patch: int) -> Tensor:
    """The positions for images of `size` pixels, by the family's rule."""
    return resampled(found.tensors["pos_embed"], size // patch, **found.resample)
