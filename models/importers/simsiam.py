"""SimSiam: a ResNet below `encoder`, whose fc is the projector."""

from models.importers.base import Checkpoint, Family, Found, Questions, imagenet, take
from models.importers.layouts import canonical


def claims(checkpoint: Checkpoint) -> bool:
    names = checkpoint.state()
    return "encoder.conv1.weight" in names and any(name.startswith("predictor.") for name in names)


def translate(checkpoint: Checkpoint, questions: Questions) -> Found:
    kept, dropped = take(checkpoint.state(), "encoder.", {"fc.": "the projector", "predictor.": "the predictor"})
    found = canonical(kept)
    found.dropped |= dropped
    found.preprocessing = imagenet()
    found.origin = "SimSiam's evaluation (256, 224, bilinear)"
    return found


FAMILY = Family("simsiam", "SimSiam", claims, translate)
