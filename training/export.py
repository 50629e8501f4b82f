"""From trained weights to an artifact that can be served and watched: quality, reference, canary."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from fullrank import Reference
from models.artifact import Artifact, Canary, Preprocessing, save
from models.embedder import Embedder, normalize
from training.data import SOURCES, ImageSet
from training.evaluate import Spectrum, evaluate

BASIS_ROWS, CANARY_ROWS = 20_000, 256


def export(
    artifact: Artifact,
    fit: ImageSet,
    held_out: ImageSet,
    train: ImageSet,
    test: ImageSet,
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
    splits = fit.images[:BASIS_ROWS], held_out.images[:-canary_rows]
    return save(with_reference(measured, *splits, canary_images, licence), folder)


def with_reference(
    artifact: Artifact, basis_images: Tensor, held_out_images: Tensor, canary_images: Tensor, licence: str
) -> Artifact:
    """The artifact with a reference made of two disjoint splits of images, and with its canary.

    All images are (n, c, h, w) uint8. ValueError when a split is too small for a reference.
    """
    embedder = Embedder(artifact)
    canary = normalize(embedder.embed_arrays(canary_images))
    reference = Reference.build(
        normalize(embedder.embed_arrays(basis_images)), normalize(embedder.embed_arrays(held_out_images)), canary=canary
    )
    return replace(artifact, reference=reference, canary=Canary(canary_images, canary, licence))


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
