"""Builds an encoder's reference: statistics of its embeddings of healthy images, and canary images with embeddings.

A training run's export, `fullrank import --data` and `fullrank reference` all use this builder. It takes pixels as the
service would see them, in chunks, and keeps only the encoder's rows.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from fullrank import Moments, Reference
from fullrank.calibration.enough import MINIMUM_ROWS
from fullrank.calibration.resample import calibrated
from fullrank.descriptors import describe
from models.artifact import Artifact, Canary
from models.decode import ImageError
from models.embedder import Embedder, normalize
from models.preprocess import Pixels, Preprocessing, decode, prepare_arrays

BASIS_ROWS = 20_000
CANARY_ROWS = 256
LEAST_CANARY = 64
LIMIT = 2 * BASIS_ROWS
CHUNK = 256
CHUNK_PIXELS = 1 << 22  # of all images in a chunk that is read from files
SYNTHETIC = "CC0-1.0 (synthetic)"


class Progress(Protocol):
    """Called with a stage, "embedding" or "calibrating", how much of it is newly done, and of how much, where known."""

    def __call__(self, stage: str, done: int, total: int | None = None, /) -> None: ...


class ImagesError(ValueError):
    """Raised if no reference can be made of the images: none, too few or unreadable. The message says what to do."""


def silent(stage: str, done: int, total: int | None = None) -> None:
    """Show no progress."""


def with_reference(
    artifact: Artifact,
    basis: Iterable[Pixels],
    held_out: Iterable[Pixels],
    canary: Tensor,
    licence: str,
    *,
    labels: Tensor | None = None,
    embedder: Embedder | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Build a reference from two disjoint sets of images. Returns the artifact with it and with its canary.

    basis, held_out: chunks of pixels (n, channels, size, size) uint8. canary: (m, channels, size, size) uint8, under
    `licence`. labels: (n,) of the held-out images, if known, to simulate sessions and drift. The reference is
    calibrated if there are at least 1024 held-out images. Raises ImagesError if a set has fewer than 32 images, if an
    embedding is not finite, and if all of them are one point.
    """
    embedder = embedder or Embedder(artifact)
    first, _ = embedded(basis, embedder, progress)
    second, inputs = embedded(held_out, embedder, progress)
    return _referenced(artifact, (first, second), inputs, canary, licence, labels, embedder, progress)


def from_images(
    artifact: Artifact,
    pixels: Iterable[Pixels],
    canary: Tensor,
    licence: str,
    *,
    embedder: Embedder | None = None,
    progress: Progress = silent,
    seed: int = 0,
) -> Artifact:
    """Build a reference from one set of images, split at random (`seed`) into two halves; else as `with_reference`.

    One half gives the directions. The other gives the variance in them, and, from 1024 images on, the range of healthy
    traffic. Raises ImagesError if a half has fewer images than the encoder has dimensions, or fewer than 64.
    """
    embedder = embedder or Embedder(artifact)
    rows, inputs = embedded(pixels, embedder, progress)
    order = torch.randperm(len(rows), generator=Generator().manual_seed(seed))
    first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
    enough(len(rows), artifact.card.dimension)
    halves = rows[first], rows[second]
    return _referenced(artifact, halves, inputs[second], canary, licence, None, embedder, progress)


def from_corpus(
    artifact: Artifact,
    sample: Tensor,
    inputs: Tensor,
    whole: Moments,
    canary: Tensor,
    licence: str,
    *,
    embedder: Embedder | None = None,
) -> Artifact:
    """Build a reference from the rows of a corpus that were embedded before; else as `with_reference`.

    sample: (n, d) unit rows drawn uniformly from the corpus, in random order; inputs: (n, k) their images' descriptors;
    whole: the moments of all rows of the corpus, the sample's among them. One half of the sample gives the directions,
    all other rows of the corpus the variance in them. The other half is resampled for the range of healthy traffic.
    Raises ImagesError if a half has fewer rows than the encoder has dimensions, or fewer than 64.
    """
    embedder = embedder or Embedder(artifact)
    half = len(sample) // 2
    enough(len(sample), artifact.card.dimension)
    basis = Moments(artifact.card.dimension, whole.shift).add(sample[:half])
    expected = normalize(embedder.embed(canary))
    dtype = str(embedder.dtype).removeprefix("torch.")
    with _as_images_error():
        reference = Reference.of_moments(basis, whole.without(basis), canary=expected, dtype=dtype)
    if len(sample) - half >= MINIMUM_ROWS:
        reference = calibrated(reference, sample[half:], None, inputs[half:])
    return replace(artifact, reference=reference, canary=Canary(canary, expected, licence))


def recalibrated(artifact: Artifact, held_out: Iterable[Pixels], labels: Tensor | None = None) -> Artifact:
    """Calibrate the thresholds again, on the images that gave the reference. Raises ImagesError for other images."""
    reference = artifact.reference
    if reference is None:
        raise ImagesError(f"{artifact.card.name} has no reference to calibrate")
    rows, inputs = embedded(held_out, Embedder(artifact))
    if not torch.allclose(rows.double().mean(0), reference.mean, atol=1e-5):
        raise ImagesError(f"{artifact.card.name}: its reference was measured on other images; pass the run's --limit")
    return replace(artifact, reference=calibrated(reference, rows, labels, inputs))


def embedded(pixels: Iterable[Pixels], embedder: Embedder, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """Embed images: (n, d) unit rows and (n, k) descriptors. The pixels are not kept. ImagesError as with_reference."""
    rows: list[Tensor] = []
    inputs: list[Tensor] = []
    for chunk in pixels:
        rows.append(normalize(embedder.embed(chunk)))
        inputs.append(torch.from_numpy(describe(chunk)))
        progress("embedding", len(chunk))
    if not rows:
        raise ImagesError("none of the images could be read")
    finite = torch.cat(rows).isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ImagesError(f"{int((~finite).sum())} images give embeddings that are not finite: the encoder is damaged")
    return torch.cat(rows), torch.cat(inputs)


def _referenced(
    artifact: Artifact,
    splits: tuple[Tensor, Tensor],
    inputs: Tensor,
    canary: Tensor,
    licence: str,
    labels: Tensor | None,
    embedder: Embedder,
    progress: Progress,
) -> Artifact:
    first, second = splits
    dtype = str(embedder.dtype).removeprefix("torch.")
    expected = normalize(embedder.embed(canary))
    before = 0

    def drawn(done: int, total: int) -> None:
        nonlocal before
        progress("calibrating", done - before, total)
        before = done

    with _as_images_error():
        reference = Reference.build(
            first,
            second,
            canary=expected,
            dtype=dtype,
            labels=labels,
            inputs=inputs,
            progress=drawn,
        )
    return replace(artifact, reference=reference, canary=Canary(canary, expected, licence))


@contextmanager
def _as_images_error() -> Iterator[None]:
    """Raise the library's ValueError, for rows of which no reference can be made, as ImagesError."""
    try:
        yield
    except ValueError as error:
        raise ImagesError(str(error)) from error


def enough(rows: int, dimension: int) -> None:
    """Raise ImagesError if the halves of so many rows are too few to measure so many dimensions.

    Commands ask before they embed anything, too: a refusal after minutes would waste them.
    """
    needed = max(LEAST_CANARY, dimension)
    if rows // 2 < needed:
        raise ImagesError(
            f"{rows} images are too few for a reference of {dimension} dimensions:"
            f" each half needs {needed}, so give at least {2 * needed}, better {2 * max(MINIMUM_ROWS, 4 * needed)}"
        )


@dataclass
class ImageFolder:
    """The image files in a folder and below, in a random order (`seed`). Files that cannot be read are `skipped`."""

    paths: list[Path]
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, limit: int = LIMIT, seed: int = 0, option: str = "--data") -> "ImageFolder":
        """At most `limit` files with an image's extension. Raises ImagesError, naming `option`, if there are none."""
        Image.init()
        if not folder.is_dir():
            raise ImagesError(f"{folder} is not a folder; {option} is a folder of image files")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.EXTENSION and path.is_file())
        if not found:
            raise ImagesError(f"{folder} holds no image files (*.png, *.jpg, ...), nor do the folders below it")
        order = np.random.default_rng(seed).permutation(len(found))[:limit]
        return cls([found[i] for i in order])

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, preprocessing: Preprocessing) -> Iterator[Pixels]:
        """(n, channels, size, size) uint8, as the service would decode the files."""
        chunk = max(1, min(CHUNK, CHUNK_PIXELS // preprocessing.size**2))
        with ThreadPoolExecutor(4) as threads:
            for start in range(0, len(self.paths), chunk):
                read = threads.map(lambda path: _read(path, preprocessing), self.paths[start : start + chunk])
                good = []
                for image in read:
                    if isinstance(image, str):
                        self.skipped.append(image)
                    else:
                        good.append(image)
                if good:
                    yield np.stack(good)

    def reasons(self, count: int = 3) -> str:
        """The reasons why the first few files were skipped, and how many more there are."""
        more = f"; and {len(self.skipped) - count} more" if len(self.skipped) > count else ""
        return "; ".join(self.skipped[:count]) + more


def _read(path: Path, preprocessing: Preprocessing) -> Pixels | str:
    """The pixels, or why there are none."""
    try:
        return decode(path.read_bytes(), preprocessing)
    except (ImageError, OSError) as error:
        return f"{path}: {error}"


def in_chunks(images: Tensor, preprocessing: Preprocessing) -> Iterator[Pixels]:
    """(n, c, h, w) uint8 images of any size -> (256, channels, size, size) at a time, as the service would see them."""
    for part in torch.split(images, CHUNK):
        yield prepare_arrays(part, preprocessing)


def canary_images(folder: Path | None, preprocessing: Preprocessing) -> Tensor:
    """Canary images (m, channels, size, size) uint8: up to 256 files of a folder, or synthetic ones for None.

    Raises ImagesError for a folder with fewer than 64 readable images.
    """
    if folder is None:
        return synthetic_canary(preprocessing)
    images = ImageFolder.of(folder, CANARY_ROWS, option="--canary")
    pixels = list(images.pixels(preprocessing))
    if (count := sum(map(len, pixels))) < LEAST_CANARY:
        raise ImagesError(f"{folder} holds {count} readable images; a canary needs at least {LEAST_CANARY}")
    return torch.from_numpy(np.concatenate(pixels))


def synthetic_canary(preprocessing: Preprocessing, count: int = CANARY_ROWS) -> Tensor:
    """Synthetic canary images (count, channels, size, size) uint8: smooth random fields at mixed scales.

    Anyone may redistribute them. They do not measure quality: they need only excite the encoder's dimensions and never
    change.
    """
    generator = Generator().manual_seed(0)
    size = preprocessing.size
    fields = []
    for index in range(count):
        cells = 2 + index % 7
        noise = torch.randn(1, preprocessing.channels, cells, cells, generator=generator)
        field = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
        fields.append(((field * 0.25 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(fields)
