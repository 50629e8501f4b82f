"""The reference that an artifact leaves training with."""

import math
from dataclasses import replace

import pytest
import torch

from fullrank.verdict import thresholds
from models.artifact import Artifact, load
from training.data import SAMPLE, ImageSet, read_fashion_mnist
from training.export import recalibrated, with_reference


@pytest.fixture(scope="module")
def images() -> ImageSet:
    parts = [read_fashion_mnist(SAMPLE, split) for split in ("train", "test")]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


@pytest.fixture(scope="module")
def artifact(small_artifact) -> Artifact:
    return load(small_artifact)


def test_enough_held_out_images_calibrate_the_reference(artifact, images):
    bare = replace(artifact, reference=None, canary=None)
    held_out = images.take(slice(0, 1100))
    made = with_reference(bare, images.images[1100:], held_out.images, images.images[:40], "MIT", held_out.labels)
    assert made.reference is not None
    limit = thresholds(made.reference)
    assert math.isfinite(limit["input_distance"])
    assert limit["evidence"] == 8
    again = recalibrated(made, held_out)
    assert thresholds(again.reference) == limit
    with pytest.raises(ValueError, match="measured on other images"):
        recalibrated(made, images.take(slice(100, 1200)))
    with pytest.raises(ValueError, match="no reference"):
        recalibrated(bare, held_out)


def test_few_held_out_images_leave_the_fixed_thresholds(artifact):
    assert artifact.reference.calibration is None
    assert torch.isfinite(artifact.reference.mean).all()
