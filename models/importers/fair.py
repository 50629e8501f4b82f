"""FAIR's ResNets: training checkpoints and final files of Barlow Twins, VICReg (widened too) and DirectCLR."""

from models.importers.base import Checkpoint, Family, Found, Questions, imagenet, take
from models.importers.layouts import canonical

DROPPED = {
    "projector.": "the projector",
    "online_head.": "the online classifier",
    "bn.": "the projector's last normalisation",
}


def claims(checkpoint: Checkpoint) -> bool:
    final = checkpoint.tensors("backbone") and (checkpoint.tensors("head") or checkpoint.tensors("projector"))
    tensors = checkpoint.tensors("model")
    training = "backbone.conv1.weight" in tensors and any(name.startswith("projector.") for name in tensors)
    return bool(final) or training


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    tensors = checkpoint.tensors("model")
    if tensors:
        kept, dropped = take(tensors, "backbone.", DROPPED)
    else:
        kept, dropped = take(checkpoint.tensors("backbone"), "")
        for part in ("head", "projector"):
            dropped |= {f"{part}.{name}": "the head behind the representation" for name in checkpoint.tensors(part)}
    found = canonical(kept)
    found.dropped |= dropped
    found.preprocessing = imagenet()
    found.origin = "FAIR's evaluation (256, 224, bilinear)"
    return found


FAMILY = Family("fair", "Barlow Twins, VICReg, DirectCLR", claims, translate)
