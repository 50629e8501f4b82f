"""Albums: the images of a report, given as data URIs when a page needs one."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from models.decode import MAX_PIXELS

SIDE = 96


class Album(Protocol):
    """Images by number."""

    def uri(self, index: int) -> str | None:
        """The image as a data URI, or None if it cannot be read."""


class Arrays:
    """An album of (m, c, h, w) uint8 images, kept at 96 pixels at most."""

    def __init__(self, images: Tensor) -> None:
        self._images = shrunk(images)

    def only(self, mask: Tensor) -> "Arrays":
        """The images that a mask (m,) keeps."""
        return Arrays(self._images[mask])

    def uri(self, index: int) -> str:
        pixels = self._images[index].permute(1, 2, 0).numpy()
        return _png(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


class Files:
    """An album of image files, named relative to a folder; read when asked for."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names = names
        self._folder = folder

    def uri(self, index: int) -> str | None:
        try:
            with Image.open(self._folder / self._names[index]) as file:
                if file.width * file.height > MAX_PIXELS:
                    return None
                file.draft("RGB", (SIDE, SIDE))
                image = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            return None
        image.thumbnail((SIDE, SIDE))
        return _png(image)


def shrunk(images: Tensor) -> Tensor:
    """(m, c, h, w) uint8, at most 96 pixels high and wide."""
    side = max(images.shape[2:])
    if side <= SIDE:
        return images
    size = tuple(max(1, round(it * SIDE / side)) for it in images.shape[2:])
    small = [F.interpolate(it.float(), size=size, mode="area") for it in torch.split(images, 64)]
    return torch.cat(small).round().to(torch.uint8)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
