"""Give an encoder a reference: what its embeddings of healthy images look like, and canary images with theirs.

The one builder: a training run's export, `fullrank import --data` and `fullrank reference` all come through here. It
takes pixels as the service would see them, in chunks, and keeps only the rows that the encoder makes of them.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from fullrank import Reference
from fullrank.calibration.inputs import thumbnails
from fullrank.calibration.resample import MINIMUM_ROWS, calibrated
from models.artifact import Artifact, Canary
from models.decode import ImageError
from models.embedder import Embedder, normalize
from models.preprocess import Pixels, Preprocessing, decode, prepare_arrays

BASIS_ROWS = 20_000
CANARY_ROWS = 256
LEAST_CANARY = 64
LIMIT = 2 * BASIS_ROWS
CHUNK = 256
SYNTHETIC = "CC0-1.0 (synthetic)"

Progress = Callable[[str, int], None]
"""Called with what is being done, such as "embedding" or "calibrating", and how many images of it are newly done."""


class ImagesError(ValueError):
    """Images that no reference can be made of: none, too few, or unreadable ones; the message says what to do."""


def silent(stage: str, images: int) -> None:
    """No progress is shown."""


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
    """The artifact with a reference made of two disjoint sets of images, and with its canary.

    basis, held_out: chunks of pixels (n, channels, size, size) uint8; canary (m, channels, size, size) uint8, under
    `licence`; labels (n,) of the held-out images, if known, say what sessions and drift are of. The reference is
    calibrated from 1024 held-out images on. ImagesError when either set is empty, or when an embedding is not finite;
    ValueError when either has fewer than 32 images.
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
    """The artifact with a reference of two disjoint halves of the images, drawn from `seed`; else as `with_reference`.

    One half gives the directions. The other gives what healthy embeddings have in them, and from 1024 images on how
    far healthy traffic strays. ImagesError when a half has fewer images than the encoder has dimensions, or than 64.
    """
    embedder = embedder or Embedder(artifact)
    rows, inputs = embedded(pixels, embedder, progress)
    order = torch.randperm(len(rows), generator=Generator().manual_seed(seed))
    first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
    needed = max(LEAST_CANARY, artifact.card.dimension)
    if len(first) < needed:
        raise ImagesError(
            f"{len(rows)} images are too few for a reference of {artifact.card.dimension} dimensions:"
            f" each half needs {needed}, so give at least {2 * needed}, better {2 * max(MINIMUM_ROWS, 4 * needed)}"
        )
    halves = rows[first], rows[second]
    return _referenced(artifact, halves, inputs[second], canary, licence, None, embedder, progress)


def recalibrated(artifact: Artifact, held_out: Iterable[Pixels], labels: Tensor | None = None) -> Artifact:
    """The artifact with thresholds measured anew on the images that gave its reference; ImagesError for others."""
    reference = artifact.reference
    if reference is None:
        raise ImagesError(f"{artifact.card.name} has no reference to calibrate")
    rows, inputs = embedded(held_out, Embedder(artifact))
    if not torch.allclose(rows.double().mean(0), reference.mean, atol=1e-5):
        raise ImagesError(f"{artifact.card.name}: its reference was measured on other images; pass the run's --limit")
    return replace(artifact, reference=calibrated(reference, rows, labels, inputs))


def embedded(pixels: Iterable[Pixels], embedder: Embedder, progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """(n, d) unit rows and (n, k) descriptors of what was embedded; only these are kept. ImagesError as above."""
    rows: list[Tensor] = []
    inputs: list[Tensor] = []
    for chunk in pixels:
        rows.append(normalize(embedder.embed(chunk)))
        inputs.append(torch.from_numpy(thumbnails(chunk)))
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
    reference = Reference.build(first, second, canary=expected, dtype=dtype)
    if len(second) >= MINIMUM_ROWS:
        progress("calibrating", 0)
        reference = calibrated(reference, second, labels, inputs)
    return replace(artifact, reference=reference, canary=Canary(canary, expected, licence))


@dataclass
class ImageFolder:
    """Every image file below a folder, in an order drawn from `seed`; files that cannot be read are `skipped`."""

    paths: list[Path]
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, limit: int = LIMIT, seed: int = 0, option: str = "--data") -> "ImageFolder":
        """At most `limit` of the files whose name ends as an image's does. ImagesError names the option for none."""
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
        with ThreadPoolExecutor(4) as threads:
            for start in range(0, len(self.paths), CHUNK):
                read = threads.map(lambda path: _read(path, preprocessing), self.paths[start : start + CHUNK])
                good = []
                for image in read:
                    if isinstance(image, str):
                        self.skipped.append(image)
                    else:
                        good.append(image)
                if good:
                    yield np.stack(good)

    def reasons(self, count: int = 3) -> str:
        """Why the first few of the skipped files were skipped, and how many more there are."""
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
    """(m, channels, size, size) uint8: up to 256 files of a folder, or for None synthetic ones.

    ImagesError for a folder with fewer than 64 readable images.
    """
    if folder is None:
        return synthetic_canary(preprocessing)
    images = ImageFolder.of(folder, CANARY_ROWS, option="--canary")
    pixels = list(images.pixels(preprocessing))
    if (count := sum(map(len, pixels))) < LEAST_CANARY:
        raise ImagesError(f"{folder} holds {count} readable images; a canary needs at least {LEAST_CANARY}")
    return torch.from_numpy(np.concatenate(pixels))


def synthetic_canary(preprocessing: Preprocessing, count: int = CANARY_ROWS) -> Tensor:
    """Images anyone may redistribute: smooth random fields at mixed scales, (count, channels, size, size) uint8.

    They say nothing about quality; they only have to excite the encoder's dimensions, and to stay the same for ever.
    """
    generator = Generator().manual_seed(0)
    size = preprocessing.size
    fields = []
    for index in range(count):
        cells = 2 + index % 7
        noise = torch.randn(1, preprocessing.channels, cells, cells, generator=generator)
        fields.append(F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False))
    return ((torch.cat(fields) * 0.25 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
