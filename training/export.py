"""From trained weights to an artifact that can be served and watched: quality, reference, canary.

    python -m training.export models/pretrained/fashion-directclr      # calibrate its reference again

reads the split that carries the reference once more, from the data and the seed in the artifact's card.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fullrank import Reference
from fullrank.calibration.inputs import thumbnails
from fullrank.calibration.resample import MINIMUM_ROWS, calibrated
from models.artifact import Artifact, Canary, load, save
from models.embedder import Embedder, normalize
from models.preprocess import Preprocessing, prepare_arrays
from training.data import SOURCES, Images, ImageSet, load_split
from training.evaluate import Spectrum, evaluate

BASIS_ROWS, CANARY_ROWS = 20_000, 256


def export(
    artifact: Artifact,
    fit: ImageSet,
    held_out: ImageSet,
    train: Images,
    test: Images,
    projection: Spectrum,
    folder: Path,
) -> Artifact:
    """Measure the encoder once on the test set, give it a reference and a canary, and write it to `folder`."""
    source = SOURCES[artifact.card.training["data"]]
    canary_rows = min(CANARY_ROWS, len(held_out) // 4)
    quality = evaluate(artifact, train, test) | {"projection": projection.summary()}
    if source.redistributable:
        canary_images, licence = held_out.images[-canary_rows:], source.licence
    else:
        canary_images, licence = synthetic_canary(artifact.card.preprocessing), "CC0-1.0 (synthetic)"
    measured = replace(artifact, card=artifact.card.model_copy(update={"quality": quality}))
    # The canary's images leave the reference's split, so that neither vouches for the other.
    described = held_out.take(slice(0, len(held_out) - canary_rows))
    splits = fit.images[:BASIS_ROWS], described.images
    return save(with_reference(measured, *splits, canary_images, licence, described.labels), folder)


def with_reference(
    artifact: Artifact,
    basis_images: Tensor,
    held_out_images: Tensor,
    canary_images: Tensor,
    licence: str,
    labels: Tensor | None = None,
) -> Artifact:
    """The artifact with a reference made of two disjoint splits of images, and with its canary.

    All images are (n, c, h, w) uint8; labels (n,) of the held-out ones, if known, say what sessions and drift are of.
    The reference is calibrated from 1024 held-out images on. ValueError when a split is too small for a reference.
    """
    embedder = Embedder(artifact)
    canary, basis, rows = (
        normalize(embedder.embed_arrays(images)) for images in (canary_images, basis_images, held_out_images)
    )
    reference = Reference.build(basis, rows, canary=canary)
    if len(rows) >= MINIMUM_ROWS:
        inputs = thumbnails(prepare_arrays(held_out_images, artifact.card.preprocessing))
        reference = calibrated(reference, rows, labels, inputs)
    return replace(artifact, reference=reference, canary=Canary(canary_images, canary, licence))


def recalibrated(artifact: Artifact, held_out: ImageSet) -> Artifact:
    """The artifact with thresholds measured anew on the images that gave its reference; ValueError for others."""
    reference = artifact.reference
    if reference is None:
        raise ValueError(f"{artifact.card.name} has no reference to calibrate")
    rows = normalize(Embedder(artifact).embed_arrays(held_out.images))
    if not torch.allclose(rows.double().mean(0), reference.mean, atol=1e-5):
        raise ValueError(f"{artifact.card.name}: its reference was measured on other images; pass the run's --limit")
    inputs = thumbnails(prepare_arrays(held_out.images, artifact.card.preprocessing))
    return replace(artifact, reference=calibrated(reference, rows, held_out.labels, inputs))


def synthetic_canary(preprocessing: Preprocessing, count: int = CANARY_ROWS) -> Tensor:
    """Images anyone may redistribute: smooth random fields at mixed scales, (count, channels, size, size) uint8.

    They say nothing about quality; they only have to excite the encoder's dimensions, and to stay the same for ever.
    """
    generator, size = Generator().manual_seed(0), preprocessing.size
    fields = []
    for index in range(count):
        cells = 2 + index % 7
        field = torch.randn(1, preprocessing.channels, cells, cells, generator=generator)
        fields.append(F.interpolate(field, size=(size, size), mode="bicubic", align_corners=False))
    return ((torch.cat(fields) * 0.25 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> None:
    """Calibrate the references of encoders trained here, in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, help="where the data set lies")
    parser.add_argument("--limit", type=int, help="the --limit of the training run")
    options = parser.parse_args()
    for folder in options.encoders:
        artifact = load(folder)
        recipe = artifact.card.training
        held_out = load_split(recipe["data"], options.data, recipe["held_out"], options.limit, recipe["seed"]).held_out
        rows = artifact.reference.rows if artifact.reference is not None else 0
        # Saving replaces the folder; the logs of the run stay.
        logs = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
        save(recalibrated(artifact, held_out.take(slice(0, rows))), folder)
        for path, content in logs.items():
            path.write_bytes(content)
        print(f"{folder}: calibrated on {rows} images")


if __name__ == "__main__":
    main()
