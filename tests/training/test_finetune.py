"""The SGD protocols on a separable toy: they learn, leave the artifact alone, and touch the encoder only if asked."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from models.artifact import load
from models.embedder import Embedder
from training.data import SAMPLE, ImageSet, read_fashion_mnist, read_folder
from training.data.files import read_flat
from training.finetune import EPOCHS, sgd_table, supervised
from training.probe import linear_probe


def two_classes(split: str, n: int) -> ImageSet:
    """Trousers and bags, which any line tells apart."""
    images = read_fashion_mnist(SAMPLE, split)
    chosen = images.take(((images.labels == 1) | (images.labels == 8)).nonzero().flatten()[:n])
    return ImageSet(chosen.images, (chosen.labels == 8).long())


def test_linear_evaluation_nears_the_best_line_and_fine_tuning_beats_it(small_artifact: Path) -> None:
    """The encoder's weights are random, so that its features are poor and there is much for fine-tuning to gain."""
    artifact, train, test = load(small_artifact), two_classes("train", 160), two_classes("test", 60)
    before = {name: tensor.clone() for name, tensor in artifact.encoder.state_dict().items()}
    embedder = Embedder(artifact)
    rows, queries = embedder.embed(train.images), embedder.embed(test.images)
    best = linear_probe(rows, train.labels, queries, test.labels).top1
    frozen, tuned = (
        supervised(artifact, train, test, epochs=12, frozen=frozen, batch_size=32).top1 for frozen in (True, False)
    )
    assert frozen == pytest.approx(best, abs=0.1)
    assert tuned > max(frozen, 0.9)
    assert all(torch.equal(before[name], tensor) for name, tensor in artifact.encoder.state_dict().items())


def test_the_table_has_every_protocol_and_other_sizes_are_refused(small_artifact: Path) -> None:
    artifact, train, test = load(small_artifact), two_classes("train", 160), two_classes("test", 60)
    table = sgd_table(artifact, train, test, epochs=1)
    assert set(table) == {f"sgd_{name}_top{k}" for name in EPOCHS for k in (1, 5)}
    with pytest.raises(ValueError, match="images of 20 pixels; small takes 28"):
        supervised(artifact, ImageSet(train.images[..., :20, :20], train.labels), test, epochs=1)
    with pytest.raises(ValueError, match="images of 3 channels; small takes 1"):
        supervised(artifact, ImageSet(train.images.expand(-1, 3, -1, -1), train.labels), test, epochs=1)


def test_files_are_fine_tuned_on_as_their_images_in_memory_are(small_artifact: Path, tmp_path: Path) -> None:
    """PNG loses nothing, and the files are of the encoder's size."""
    artifact = load(small_artifact)
    sets = {"train": two_classes("train", 160), "val": two_classes("test", 60)}
    for split, images in sets.items():
        for at, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = tmp_path / split / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(folder / f"{at:03}.png")
    files = {split: read_folder(tmp_path, name) for split, name in (("train", "train"), ("val", "test"))}
    order = {split: images.labels.argsort(stable=True) for split, images in sets.items()}
    expected = sgd_table(artifact, *(sets[split].take(order[split]) for split in sets), epochs=1)
    found = sgd_table(artifact, *files.values(), epochs=1)
    assert found == {key: value for key, value in expected.items() if "linear" not in key}
    with pytest.raises(ValueError, match="no labels"):
        sgd_table(artifact, read_flat(tmp_path, "train"), files["val"], epochs=1)
