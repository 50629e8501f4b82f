"""Changes the tensor names of other libraries to those of our own modules.

ResNets: the names of torchvision (also timm's and FAIR's) and Hugging Face, and two numberings of lightly's examples.
Vision transformers: the names of timm (also FAIR's), torchvision, Hugging Face and OpenAI.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from models.importers.base import SHOWN, Found, ImportRefusedError, Tensors

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

RESNET_HEADS = {"fc.": "the classifier or projector behind the representation"}
VIT_HEADS = {
    "head.": "the classifier or projector behind the representation",
    "head_dist.": "the distillation classifier",
    "heads.": "the classifier",
    "classifier.": "the classifier",
    "mask_token": "used only while training",
    "embeddings.mask_token": "used only while training",
    "pooler.": "a layer of the classifier",
    "decoder": "the decoder, used only while training",
}

HF_RESNET: Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
LIGHTLY_RESNET: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([2-5])\.(?=\d)", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.shortcut\.", ".downsample."),
)
SEQUENTIAL_RESNET: Rules = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.(?=\d)", lambda m: f"layer{int(m[1]) - 3}."),
)
TIMM_VIT: Rules = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 trains its blocks in chunks
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^fc_norm\.", "norm."),
    (r"^reg_token$|^storage_tokens$", "register_tokens"),
)
TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
OPENAI_VIT: Rules = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^proj$", "proj.weight"),
)
HF_VIT: Rules = (
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:attention\.attention|attention|self_attn)\.(q)(?:uery|_proj)\.", r".attn.\1."),
    (r"\.(?:attention\.attention|attention|self_attn)\.(k)(?:ey|_proj)\.", r".attn.\1."),
    (r"\.(?:attention\.attention|attention|self_attn)\.(v)(?:alue|_proj)\.", r".attn.\1."),
    (r"^(blocks\.\d+)\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1.attn.proj."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^visual_projection\.", "proj."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj_"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


def canonical(tensors: Tensors) -> Found:
    """Rename the tensors of an encoder. Raises ImportRefusedError if no known library has these names."""
    for fits, kind, rules, heads in LAYOUTS:
        if fits(tensors):
            kept, dropped = {}, {}
            for name, tensor in tensors.items():
                reason = next((why for part, why in heads.items() if name.startswith(part)), None)
                if reason is not None and not _renamed(name, rules).startswith("attn_pool."):
                    dropped[name] = reason
                    continue
                new = _renamed(name, rules)
                if new in kept:
                    raise ImportRefusedError(
                        f"{name} and another tensor are both {new}: two encoders in one checkpoint?"
                    )
                kept[new] = tensor.T if name == "proj" else tensor
            facts: dict[str, Any] = {"final_norm": "pooled", "pool": "mean"} if "fc_norm.weight" in tensors else {}
            if rules is LIGHTLY_RESNET:
                # lightly's benchmarks put the model's children in a Sequential; the ReLU after the stem is no child.
                facts = {"stem_relu": False}
            return Found(kind, _resnet(kept) if kind == "resnet" else _vit(kept), dropped, facts)
    some = ", ".join(list(tensors)[:SHOWN])
    raise ImportRefusedError(
        f"the names of its {len(tensors)} tensors are those of no ResNet or vision transformer known here, such as "
        f"{some}; anything else comes through ONNX: export it and import the .onnx file"
    )


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _has(*names: str) -> Callable[[Tensors], bool]:
    return lambda tensors: all(name in tensors for name in names)


LAYOUTS: tuple[tuple[Callable[[Tensors], bool], Literal["resnet", "vit"], Rules, Mapping[str, str]], ...] = (
    (_has("conv1.weight", "layer1.0.conv1.weight"), "resnet", (), RESNET_HEADS),
    (_has("embedder.embedder.convolution.weight"), "resnet", HF_RESNET, {"classifier.": "the classifier"}),
    (_has("0.weight", "1.running_mean", "2.0.conv1.weight"), "resnet", LIGHTLY_RESNET, {}),
    (_has("0.weight", "1.running_mean", "4.0.conv1.weight"), "resnet", SEQUENTIAL_RESNET, {}),
    (_has("patch_embed.proj.weight", "pos_embed"), "vit", TIMM_VIT, VIT_HEADS),
    (_has("conv_proj.weight", "encoder.pos_embedding"), "vit", TORCHVISION_VIT, VIT_HEADS),
    (_has("embeddings.patch_embeddings.projection.weight"), "vit", HF_VIT, VIT_HEADS),
    (_has("embeddings.patch_embedding.weight"), "vit", HF_VIT, VIT_HEADS),
    (_has("class_embedding", "conv1.weight", "positional_embedding"), "vit", OPENAI_VIT, {}),
)


def _resnet(tensors: Tensors) -> Tensors:
    """Reduce batch-norm statistics to one set: lightly's split batch norm keeps several and uses their mean."""
    for name, tensor in list(tensors.items()):
        if name.endswith((".running_mean", ".running_var")):
            channels = tensors.get(f"{name.rpartition('.')[0]}.weight")
            if (
                channels is not None
                and channels.ndim == tensor.ndim == 1
                and len(channels)
                and len(tensor) > len(channels)
                and len(tensor) % len(channels) == 0
            ):
                tensors[name] = tensor.reshape(-1, len(channels)).float().mean(0)
    return tensors


def _vit(tensors: Tensors) -> Tensors:
    """Make one matrix of query, key and value, keep positions of patches only, and take our module's shapes."""
    for name in [it for it in tensors if it.endswith((".attn.q.weight", ".attn.q.bias"))]:
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        found = [tensors.pop(part, None) for part in parts]
        first = found[0]
        if first is not None and found[1] is None and name.endswith("bias"):
            found[1] = torch.zeros_like(first)  # some families have no key bias: it changes no attention weight
        whole = [it for it in found if it is not None]
        if len(whole) < 3:
            raise ImportRefusedError(f"{name} has no key or value beside it")
        tensors[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(whole)
    for name in [it for it in tensors if ".mlp.gate_proj." in it]:
        up = tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "w12")] = torch.cat([tensors.pop(name), up])
    for what in ("weight", "bias"):
        if (packed := tensors.pop(f"attn_pool.in_proj_{what}", None)) is not None:
            width = len(packed) // 3
            tensors[f"attn_pool.q.{what}"] = packed[:width]
            tensors[f"attn_pool.kv.{what}"] = packed[width:]
    return _positions(tensors)


def _positions(tensors: Tensors) -> Tensors:
    """Add their positions to the class token and the registers, and keep the patches' positions as pos_embed."""
    for name in ("cls_token", "register_tokens", "pos_embed"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    positions = tensors.get("pos_embed")
    if positions is None:
        raise ImportRefusedError(
            "there is no pos_embed: positions of another kind (rotary, relative) come through ONNX"
        )
    prefix = [name for name in ("cls_token", "register_tokens") if name in tensors]
    counts = [tensors[name].shape[1] for name in prefix]
    for extra in (0, sum(counts[:1]), sum(counts)):
        if _square(positions.shape[1] - extra):
            break
    else:
        raise ImportRefusedError(
            f"pos_embed has {positions.shape[1]} positions, which are those of no square image; export it to ONNX"
        )
    start = 0
    for name, count in zip(prefix, counts, strict=True):
        if start < extra:
            tensors[name] = tensors[name].float() + positions[:, start : start + count].float()
            start += count
    tensors["pos_embed"] = positions[:, extra:]
    return tensors


def _square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count


def shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises ImportRefusedError if the tensor is missing."""
    found: Tensor | None = tensors.get(name)
    if found is None:
        raise ImportRefusedError(f"{name} is missing: this is no whole encoder")
    return tuple(found.shape)
