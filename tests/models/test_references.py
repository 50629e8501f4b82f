"""The one builder of references: from two splits, from halves of a folder, calibrated anew; and what it refuses."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cli import app
from fullrank import Reference
from fullrank.verdict import thresholds
from models.artifact import Artifact, load, save
from models.embedder import Embedder, normalize
from models.references import (
    CHUNK,
    ImageFolder,
    ImagesError,
    canary_images,
    from_images,
    in_chunks,
    recalibrated,
    synthetic_canary,
    with_reference,
)
from training.data import SAMPLE, ImageSet, read_fashion_mnist


@pytest.fixture(scope="module")
def images() -> ImageSet:
    parts = [read_fashion_mnist(SAMPLE, split) for split in ("train", "test")]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


@pytest.fixture(scope="module")
def bare(small_artifact: Path) -> Artifact:
    return replace(load(small_artifact), reference=None, canary=None)


@pytest.fixture(scope="module")
def folder(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 files in two folders, two of them no images, and a file of another kind."""
    root = tmp_path_factory.mktemp("photographs")
    for name in ("a", "b"):
        (root / name).mkdir()
    for i, image in enumerate(images.images[:200, 0]):
        Image.fromarray(image.numpy()).save(root / "ab"[i % 2] / f"{i}.png")
    (root / "a" / "broken.png").write_bytes(b"x")
    (root / "b" / "empty.jpg").touch()
    (root / "notes.txt").write_text("not an image")
    return root


def test_enough_held_out_images_calibrate_the_reference(bare: Artifact, images: ImageSet) -> None:
    held_out, stages, totals = images.take(slice(0, 1100)), Counter[str](), set[tuple[str, int | None]]()

    def count(stage: str, done: int, total: int | None = None) -> None:
        stages[stage] += done
        totals.add((stage, total))

    def chunks(part: ImageSet) -> object:
        return in_chunks(part.images, bare.card.preprocessing)

    rest = images.take(slice(1100, None))
    made = with_reference(
        bare, chunks(rest), chunks(held_out), images.images[:40], "MIT", labels=held_out.labels, progress=count
    )
    assert totals == {("embedding", None), ("calibrating", stages["calibrating"])}
    assert stages == {"embedding": len(images), "calibrating": max(stages["calibrating"], 100)}, "in many steps"
    assert made.reference is not None
    limit = thresholds(made.reference)
    assert math.isfinite(limit["input_distance"])
    assert limit["evidence"] == 8
    again = recalibrated(made, chunks(held_out), held_out.labels)
    assert thresholds(again.reference) == limit
    with pytest.raises(ImagesError, match="measured on other images"):
        recalibrated(made, chunks(images.take(slice(100, 1200))))
    with pytest.raises(ImagesError, match="no reference"):
        recalibrated(bare, chunks(held_out))


def test_few_held_out_images_leave_the_fixed_thresholds(small_artifact: Path) -> None:
    reference = load(small_artifact).reference
    assert reference is not None
    assert reference.calibration is None
    assert torch.isfinite(reference.mean).all()


def test_a_reference_is_made_of_two_disjoint_halves(bare: Artifact, images: ImageSet) -> None:
    """Beside the library's own builder on the very rows that the seed puts in each half."""
    chosen = images.images[:300]
    canary = synthetic_canary(bare.card.preprocessing, 64)
    made = from_images(bare, in_chunks(chosen, bare.card.preprocessing), canary, "CC0", seed=3)
    rows = normalize(Embedder(bare).embed_arrays(chosen))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    expected = Reference.build(rows[order[:150]], rows[order[150:]], calibrate=False)
    assert made.reference is not None
    assert made.reference.rows == 150
    torch.testing.assert_close(made.reference.band_energy, expected.band_energy, rtol=1e-4, atol=1e-9)
    assert made.canary is not None
    torch.testing.assert_close(made.canary.embeddings, normalize(Embedder(bare).embed_arrays(canary)))


def test_too_few_images_say_how_many_are_needed(bare: Artifact, images: ImageSet) -> None:
    canary = synthetic_canary(bare.card.preprocessing, 64)
    with pytest.raises(ImagesError, match=r"100 images are too few .* 32 dimensions: each half needs 64"):
        from_images(bare, in_chunks(images.images[:100], bare.card.preprocessing), canary, "CC0")
    with pytest.raises(ImagesError, match="none of the images could be read"):
        from_images(bare, [], canary, "CC0")


def test_a_damaged_encoder_is_named(bare: Artifact, images: ImageSet) -> None:
    damaged = replace(bare, module=bare.card.architecture.build().eval())
    with torch.no_grad():
        damaged.encoder.layer4[1].bn2.bias[0] = torch.inf
    canary = synthetic_canary(bare.card.preprocessing, 64)
    with pytest.raises(ImagesError, match="150 images give embeddings that are not finite"):
        from_images(damaged, in_chunks(images.images[:150], bare.card.preprocessing), canary, "CC0")


def test_a_folder_is_read_as_the_service_would(folder: Path, bare: Artifact, tmp_path: Path) -> None:
    found = ImageFolder.of(folder)
    assert len(found) == 202
    pixels = np.concatenate(list(found.pixels(bare.card.preprocessing)))
    assert pixels.shape == (200, 1, 28, 28)
    assert sorted(Path(reason.split(": ")[0]).name for reason in found.skipped) == ["broken.png", "empty.jpg"]
    assert "; " in found.reasons()
    assert found.reasons(1).endswith("; and 1 more")
    assert ImageFolder.of(folder, limit=7).paths == found.paths[:7]
    with pytest.raises(ImagesError, match="--data is a folder of image files"):
        ImageFolder.of(folder / "notes.txt")
    with pytest.raises(ImagesError, match="holds no image files"):
        ImageFolder.of(tmp_path)
    assert canary_images(folder, bare.card.preprocessing).shape[1:] == (1, 28, 28)
    assert CHUNK == 256


def test_fullrank_reference_gives_an_encoder_one_from_a_folder(folder: Path, bare: Artifact, tmp_path: Path) -> None:
    save(bare, tmp_path / "encoder")
    result = CliRunner().invoke(app, ["reference", str(tmp_path / "encoder"), "--data", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    assert "2 files skipped" in result.stderr
    made = load(tmp_path / "encoder")
    assert made.reference is not None
    assert made.reference.rows == 100
    assert made.card.canary_licence == "CC0-1.0 (synthetic)"
    again = CliRunner().invoke(app, ["reference", str(tmp_path / "encoder"), "--data", str(folder)])
    assert again.exit_code == 2
    assert "--replace" in again.stderr
    empty = CliRunner().invoke(app, ["reference", str(tmp_path / "encoder"), "--data", str(tmp_path), "--replace"])
    assert empty.exit_code == 1
    assert "holds no image files" in empty.stderr
