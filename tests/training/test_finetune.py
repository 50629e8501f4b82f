"""The SGD protocols on a separable toy: they learn, leave the artifact alone, and touch the encoder only if asked."""

from pathlib import Path

import pytest
import torch

from models.artifact import load
from training.data import SAMPLE, ImageSet, read_fashion_mnist
from training.finetune import EPOCHS, sgd_table, supervised


def two_classes(split: str, n: int) -> ImageSet:
    """Trousers and bags, which any line tells apart."""
    images = read_fashion_mnist(SAMPLE, split)
    chosen = images.take(((images.labels == 1) | (images.labels == 8)).nonzero().flatten()[:n])
    return ImageSet(chosen.images, (chosen.labels == 8).long())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_classifier_learns_and_the_artifact_stays(small_artifact: Path, frozen: bool) -> None:
    artifact, train, test = load(small_artifact), two_classes("train", 160), two_classes("test", 60)
    before = {name: tensor.clone() for name, tensor in artifact.encoder.state_dict().items()}
    found = supervised(artifact, train, test, epochs=4, frozen=frozen, batch_size=32)
    assert found.top1 > 0.85
    assert all(torch.equal(before[name], tensor) for name, tensor in artifact.encoder.state_dict().items())


def test_the_table_has_every_protocol_and_other_sizes_are_refused(small_artifact: Path) -> None:
    artifact, train, test = load(small_artifact), two_classes("train", 160), two_classes("test", 60)
    table = sgd_table(artifact, train, test, epochs=1)
    assert set(table) == {f"sgd_{name}_top{k}" for name in EPOCHS for k in (1, 5)}
    with pytest.raises(ValueError, match="images of 20 pixels; small takes 28"):
        supervised(artifact, ImageSet(train.images[..., :20, :20], train.labels), test, epochs=1)
