"""torchvision's ResNets and vision transformers, and bare files under the same names: FAIR's, lightly-train's."""

from models.importers.base import Checkpoint, Family, Found, Questions, imagenet
from models.importers.layouts import canonical


def claims(checkpoint: Checkpoint) -> bool:
    tensors = checkpoint.state()
    resnet = "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors
    return resnet or ("conv_proj.weight" in tensors and "encoder.pos_embedding" in tensors)


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    found = canonical(checkpoint.state())
    found.preprocessing = imagenet()
    found.origin = "torchvision's V1 weights (V2: --set to=232)"
    found.facts |= {"pool": "class", "activation": "gelu", "eps": 1e-6} if found.kind == "vit" else {}
    return found


FAMILY = Family("torchvision", "torchvision, and bare ResNets under its names", claims, translate)
