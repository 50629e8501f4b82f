"""The one path from image bytes to embedding: decode -> resize -> normalise -> batched forward.

Training's evaluation, the reference, offline embedding and the service all come through here, so that an encoder is
measured on exactly what it is served on.
"""

import io
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.artifact import Artifact, Preprocessing
from models.inference import Graphs, buckets, folded

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MIN_SIDE, DRAFT = 8, 2
MAX_PIXELS = 64_000_000

Pixels = NDArray[np.uint8]


class ImageError(ValueError):
    """Bytes that cannot become an input. `code` is a stable machine-readable name, the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def decode(data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Image bytes -> (channels, size, size) uint8. Raises ImageError for anything that is not a usable image.

    The header's width x height is checked before any pixel is allocated. The first frame of an animation is used, the
    EXIF orientation is applied, transparency is laid on white.
    """
    if not data:
        raise ImageError("empty_image", "the image is empty (0 bytes); send the bytes of an image file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, max_pixels)
            # A JPEG can be decoded at an eighth, a quarter or half its size for as little of the work. Twice the size
            # wanted keeps the antialiasing to the resize that follows; tests bound what it changes.
            image.draft(None, (DRAFT * preprocessing.size, DRAFT * preprocessing.size))
            return prepare(image, preprocessing)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        message = f"the image declares far more than the limit of {max_pixels} pixels in all: scale it down first"
        raise ImageError("image_too_large", message) from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"the bytes are no image in a known format ({', '.join(FORMATS)})") from error
    # Pillow's decoders meet hostile bytes with whatever exception comes first; all of them mean a damaged file.
    except Exception as error:
        raise ImageError("damaged_image", f"the image is truncated or damaged: {error}") from error


def resize(pixels: Pixels, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(1 or 3, h, w) uint8 of any size -> (channels, size, size), as a file of these pixels would be. Or ImageError."""
    size = preprocessing.size
    if pixels.shape == (preprocessing.channels, size, size):
        return pixels
    _check_size(pixels.shape[2], pixels.shape[1], max_pixels)
    return prepare(to_image(pixels), preprocessing)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = f"the image is {width} x {height} pixels; the limit is {max_pixels} in all: scale it down first"
        raise ImageError("image_too_large", message)
    if min(width, height) < MIN_SIDE:
        message = f"the image is {width} x {height} pixels; each side needs at least {MIN_SIDE}"
        raise ImageError("image_too_small", message)


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """A Pillow image -> (channels, size, size) uint8, resized as the encoder's card says (bilinear, antialiased)."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies even what is upright
        image = ImageOps.exif_transpose(image)
    image = _flatten(image)
    image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    size = (preprocessing.size, preprocessing.size)
    if image.size != size:
        if preprocessing.resize == "stretch":
            image = image.resize(size, Image.Resampling.BILINEAR)
        else:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _flatten(image: Image.Image) -> Image.Image:
    """To a mode without palette, transparency or 16-bit samples."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def normalize(rows: Tensor) -> Tensor:
    """(n, d) -> rows of unit L2 norm; an all-zero row stays zero."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


def prepare_arrays(images: Tensor, preprocessing: Preprocessing) -> Pixels:
    """(n, c, h, w) uint8 images of any size -> (n, channels, size, size) uint8, as a file of each would be read."""
    if tuple(images.shape[1:]) == (preprocessing.channels, preprocessing.size, preprocessing.size):
        return images.cpu().numpy()
    return np.stack([prepare(to_image(image), preprocessing) for image in images])


class Embedder:
    """An encoder ready to run: (n, channels, size, size) uint8 -> (n, d) float32 representations on the CPU."""

    def __init__(
        self,
        artifact: Artifact,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 256,
    ) -> None:
        self.card = artifact.card
        self.dimension = artifact.card.dimension
        self.device, self.dtype, self.max_batch = torch.device(device), dtype, max_batch
        self._encoder = folded(artifact.encoder).to(self.device, dtype)
        self._graphs: Graphs | None = None
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.card.preprocessing.mean), torch.tensor(self.card.preprocessing.std)
        self._scale = (1 / (255 * std)).view(shape).to(self.device)
        self._offset = (-mean / std).view(shape).to(self.device)

    @torch.inference_mode()
    def embed(self, pixels: Tensor | Pixels) -> Tensor:
        """(n, channels, size, size) uint8 -> (n, d) float32, not normalised. ValueError for another shape or dtype."""
        images = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        size = self.card.preprocessing.size
        wanted = (self.card.preprocessing.channels, size, size)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"pixels are {images.dtype} {tuple(images.shape)}; this encoder takes uint8 (n, {shape})")
        batches = [self._forward(batch) for batch in torch.split(images, self.max_batch)] if len(images) else []
        return torch.cat(batches) if batches else torch.empty(0, self.dimension)

    def _forward(self, batch: Tensor) -> Tensor:
        rows = self._pass(batch.to(self.device, non_blocking=True)) if self._graphs is None else self._graphs(batch)
        return rows.float().cpu()

    def _pass(self, batch: Tensor) -> Tensor:
        x = batch.to(torch.float32, memory_format=torch.channels_last).mul_(self._scale).add_(self._offset)
        # cuDNN would round float32 convolutions to TF32: noise above the floor that float32 references allow for.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext()
        with exact:
            rows: Tensor = self._encoder(x.to(self.dtype))
        return rows

    def embed_arrays(self, images: Tensor) -> Tensor:
        """(n, c, h, w) uint8 images of any size -> (n, d) float32, resized exactly as a file of each would be."""
        return self.embed(prepare_arrays(images, self.card.preprocessing))

    def embed_files(self, paths: Iterable[str | os.PathLike[str]], max_pixels: int = MAX_PIXELS) -> Tensor:
        """Image files -> (n, d) float32. Raises ImageError naming the file, OSError when it cannot be read."""
        prepared = []
        for path in paths:
            data = Path(path).read_bytes()
            try:
                prepared.append(decode(data, self.card.preprocessing, max_pixels=max_pixels))
            except ImageError as error:
                raise ImageError(error.code, f"{os.fspath(path)}: {error}") from error
        return self.embed(np.stack(prepared)) if prepared else torch.empty(0, self.dimension)

    @torch.inference_mode()
    def warm_up(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Run each batch size once, so that the first request does not pay for kernel selection.

        On CUDA, record a graph for every bucket up to max_batch; from then on all passes are theirs.
        """
        size, channels = self.card.preprocessing.size, self.card.preprocessing.channels
        if self.device.type == "cuda" and self._graphs is None:
            self._graphs = Graphs(self._pass, (channels, size, size), buckets(self.max_batch), self.device)
        for n in batch_sizes:
            self.embed(torch.zeros(n, channels, size, size, dtype=torch.uint8))


def to_image(pixels: Tensor | Pixels) -> Image.Image:
    """(c, h, w) uint8 with one or three channels -> a Pillow image."""
    array = pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
