"""A reference for an encoder that has none, such as an imported one, from images like those it will be sent."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fullrank import Reference
from fullrank.calibration.inputs import thumbnails
from fullrank.calibration.resample import MINIMUM_ROWS, calibrated
from models.artifact import Artifact, Canary
from models.decode import ImageError
from models.embedder import Embedder, normalize
from models.preprocess import Pixels, Preprocessing, decode, prepare_arrays
from training.data import DataError, Images
from training.export import BASIS_ROWS, CANARY_ROWS, synthetic_canary

LIMIT = 2 * BASIS_ROWS
CHUNK = 256
Progress = Callable[[int], None]


@dataclass
class Folder:
    """Every image file below a folder, in an order drawn from `seed`; files that cannot be read are `skipped`."""

    paths: list[Path]
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, limit: int = LIMIT, seed: int = 0, option: str = "--data") -> "Folder":
        """At most `limit` of the files whose name ends as an image's does. DataError, naming the option, for none."""
        Image.init()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; {option} is a folder of image files")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.EXTENSION and path.is_file())
        if not found:
            raise DataError(f"{folder} holds no image files (*.png, *.jpg, ...), nor do the folders below it")
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


def of_data_set(images: Images, preprocessing: Preprocessing, limit: int = LIMIT) -> Iterator[Pixels]:
    """(n, channels, size, size) uint8 of the first `limit` images of a data set, as the service would see them."""
    for chunk in images.chunks(preprocessing):
        for part in torch.split(chunk.images[:limit], CHUNK):
            limit -= len(part)
            yield prepare_arrays(part, preprocessing)


def canary_images(folder: Path | None, preprocessing: Preprocessing) -> Tensor:
    """(m, channels, size, size) uint8: up to 256 files of a folder, or synthetic ones. DataError for fewer than 64."""
    if folder is None:
        return synthetic_canary(preprocessing)
    images = Folder.of(folder, CANARY_ROWS, option="--canary")
    pixels = list(images.pixels(preprocessing))
    if (count := sum(map(len, pixels))) < 64:
        raise DataError(f"{folder} holds {count} readable images; a canary needs at least 64")
    return torch.from_numpy(np.concatenate(pixels))


def build(
    artifact: Artifact,
    pixels: Iterator[Pixels],
    canary: Tensor,
    licence: str,
    *,
    embedder: Embedder,
    progress: Progress = lambda images: None,
    seed: int = 0,
) -> Artifact:
    """The artifact with a reference of two disjoint halves of the images, drawn from `seed`, and with a canary.

    One half gives the directions; the other what healthy embeddings have in them, and from 1024 images on how far
    healthy traffic strays. DataError when a half has fewer images than 64 or than the encoder has dimensions.
    """
    rows, inputs = _embedded(pixels, embedder, progress)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
    needed = max(64, artifact.card.dimension)
    if len(first) < needed:
        raise DataError(
            f"{len(rows)} images are too few for a reference of {artifact.card.dimension} dimensions: "
            f"each half needs {needed}, so give at least {2 * needed}, better {2 * max(MINIMUM_ROWS, 4 * needed)}"
        )
    dtype = str(embedder.dtype).removeprefix("torch.")
    expected = normalize(embedder.embed(canary))
    reference = Reference.build(rows[first], rows[second], canary=expected, dtype=dtype)
    if len(second) >= MINIMUM_ROWS:
        reference = calibrated(reference, rows[second], None, inputs[second])
    return replace(artifact, reference=reference, canary=Canary(canary, expected, licence))


def _embedded(pixels: Iterator[Pixels], embedder: Embedder, progress: Progress) -> tuple[Tensor, Tensor]:
    """(n, d) unit rows and (n, k) descriptors of what was embedded; only these are kept."""
    rows: list[Tensor] = []
    inputs: list[Tensor] = []
    for chunk in pixels:
        rows.append(normalize(embedder.embed(chunk)))
        inputs.append(torch.from_numpy(thumbnails(chunk)))
        progress(len(chunk))
    if not rows:
        raise DataError("none of the images could be read")
    finite = torch.cat(rows).isfinite().all(dim=1)
    if not bool(finite.all()):
        raise DataError(f"{int((~finite).sum())} images give embeddings that are not finite: the encoder is damaged")
    return torch.cat(rows), torch.cat(inputs)


def _read(path: Path, preprocessing: Preprocessing) -> Pixels | str:
    """The pixels, or why there are none."""
    try:
        return decode(path.read_bytes(), preprocessing)
    except (ImageError, OSError) as error:
        return f"{path}: {error}"


def first_few(reasons: Sequence[str], count: int = 3) -> str:
    """The first reasons, and how many more there are."""
    more = f"; and {len(reasons) - count} more" if len(reasons) > count else ""
    return "; ".join(reasons[:count]) + more
