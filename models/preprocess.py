"""From an image to the encoder's input pixels, as the encoder's card says.

Training's evaluation, the reference, offline embedding and the service all come through here, so that an encoder is
measured on exactly what it is served on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.decode import MAX_PIXELS, check_size, opened

if TYPE_CHECKING:  # the processes that decode for a service do without torch
    from torch import Tensor

# Twice the size wanted keeps the antialiasing to the resize that follows; tests bound what it changes.
DRAFT = 2

Pixels = NDArray[np.uint8]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocessing(Strict):
    """How an image becomes the encoder's input. `stretch` ignores the aspect ratio, `crop` keeps the centre square."""

    size: int = Field(ge=8, le=1024, description="height and width of the input in pixels")
    resize: Literal["stretch", "crop"] = "crop"
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Preprocessing:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


def decode(data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Image bytes -> (channels, size, size) uint8. Raises ImageError for anything that is not a usable image.

    The first frame of an animation is used, the EXIF orientation is applied, transparency is laid on white.
    """
    with opened(data, draft=DRAFT * preprocessing.size, max_pixels=max_pixels) as image:
        return prepare(image, preprocessing)


def resize(pixels: Pixels, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(1 or 3, h, w) uint8 of any size -> (channels, size, size), as a file of these pixels would be. Or ImageError."""
    size = preprocessing.size
    if pixels.shape == (preprocessing.channels, size, size):
        return pixels
    check_size(pixels.shape[2], pixels.shape[1], max_pixels)
    return prepare(to_image(pixels), preprocessing)


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """A Pillow image -> (channels, size, size) uint8, resized as the encoder's card says (bilinear, antialiased)."""
    image = upright(image, preprocessing.channels)
    size = (preprocessing.size, preprocessing.size)
    if image.size != size:
        if preprocessing.resize == "stretch":
            image = image.resize(size, Image.Resampling.BILINEAR)
        else:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """Turned as its EXIF orientation says, transparency on white, 16 bits scaled to 8; grey for one channel, else RGB.

    What training crops from goes through here too.
    """
    if orientation(image) != 1:  # exif_transpose copies even what is upright
        image = ImageOps.exif_transpose(image)
    return _flatten(image).convert("L" if channels == 1 else "RGB")


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright; from 5 on width and height change places."""
    found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found


def _flatten(image: Image.Image) -> Image.Image:
    """To a mode without palette, transparency or 16-bit samples."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def prepare_arrays(images: Tensor, preprocessing: Preprocessing) -> Pixels:
    """(n, c, h, w) uint8 images of any size -> (n, channels, size, size) uint8, as a file of each would be read."""
    if tuple(images.shape[1:]) == (preprocessing.channels, preprocessing.size, preprocessing.size):
        return images.cpu().numpy()
    return np.stack([prepare(to_image(image), preprocessing) for image in images])


def to_image(pixels: Tensor | Pixels) -> Image.Image:
    """(c, h, w) uint8 with one or three channels -> a Pillow image."""
    array = pixels if isinstance(pixels, np.ndarray) else pixels.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
