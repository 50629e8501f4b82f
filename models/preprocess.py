"""Preprocessing: turns an image into the encoder's input pixels, as the encoder's card says.

Training's evaluation, the reference, offline embedding and the service all use this code, so that an encoder is
measured on exactly the pixels that it gets in service.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.decode import MAX_PIXELS, ImageError, check_size, opened

if TYPE_CHECKING:  # the service's decoding processes do not import torch
    from torch import Tensor

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

MAX_ASPECT = 32  # largest aspect ratio where the short side is resized: a few bytes could ask for a huge long side

Pixels = NDArray[np.uint8]
Resize = Literal["short", "squash", "pad", "stretch", "crop"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocessing(Strict):
    """The preprocessing of an encoder: resize to `to`, crop the centre square of `size`, scale, normalise.

    resize: `short` makes the short side `to` and keeps the aspect ratio. `squash` makes both sides `to`. `pad` makes
    the long side `to`, and fills up to `size` with `fill`. Two older values: `stretch` is `squash` to `size`, and
    `crop` takes the largest centre square and resizes it.
    """

    size: int = Field(ge=8, le=2048, description="height and width of the input in pixels")
    resize: Resize = "crop"
    to: int | None = Field(default=None, ge=8, le=4096, description="the side, in pixels, that `resize` aims at")
    interpolation: Interpolation = "bilinear"
    antialias: bool = Field(default=True, description="false: bilinear between the nearest pixels, as OpenCV resizes")
    centre: Literal["round", "floor"] = Field(
        default="round", description="where the centre square of an odd margin starts: torchvision's rule, or PIL's"
    )
    fill: tuple[int, ...] = Field(default=(), description="what `pad` pads with, one value a channel; black if absent")
    draft: int = Field(
        default=2, ge=0, le=8, description="decode a JPEG at a fraction not below so many times the target; 0: in full"
    )
    channels: Literal[1, 3] = 3
    scale: float = Field(default=1 / 255, gt=0, description="pixels of 0 to 255 are multiplied by it first")
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def target(self) -> int:
        return self.to or self.size

    @model_validator(mode="after")
    def _consistent(self) -> Preprocessing:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise ValueError("scale, mean and std must be finite numbers")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.fill and (len(self.fill) != self.channels or min(self.fill) < 0 or max(self.fill) > 255):
            raise ValueError(f"fill needs {self.channels} values of 0 to 255")
        if self.resize in ("stretch", "crop") and (self.to or self.interpolation != "bilinear"):
            raise ValueError(f"{self.resize!r} resizes to size, bilinear; use short or squash for anything else")
        if not self.antialias and self.interpolation != "bilinear":
            raise ValueError(f"without antialiasing, interpolation is bilinear, not {self.interpolation}")
        if self.target < self.size:
            raise ValueError(f"to ({self.to}) is less than size ({self.size})")
        return self


def decode(
    data: bytes,
    preprocessing: Preprocessing,
    *,
    max_pixels: int = MAX_PIXELS,
    max_whole_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Image bytes -> (channels, size, size) uint8. Raises ImageError for anything that is not a usable image.

    It uses the first frame of an animation, applies the EXIF orientation, and puts transparent images on white.
    """
    draft = preprocessing.draft * preprocessing.target
    with opened(data, draft=draft, max_pixels=max_pixels, max_whole_pixels=max_whole_pixels) as image:
        return prepare(image, preprocessing)


def resize(pixels: Pixels, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """(1 or 3, h, w) uint8 of any size -> (channels, size, size), as a file of these pixels would be. Or ImageError."""
    size = preprocessing.size
    if pixels.shape == (preprocessing.channels, size, size):
        return pixels
    check_size(pixels.shape[2], pixels.shape[1], max_pixels)
    return prepare(to_image(pixels), preprocessing)


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """A Pillow image -> (channels, size, size) uint8: rotated upright, put on white, converted, resized and cropped.

    Colour conversion comes before resizing: indices into a palette cannot be interpolated.
    """
    image = _centre(_resized(upright(image, preprocessing.channels), preprocessing), preprocessing)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def upright(image: Image.Image, channels: int = 3) -> Image.Image:
    """Rotate by the EXIF orientation, put transparency on white, scale 16 bits to 8; grey for one channel, else RGB.

    Training's crops use this too.
    """
    if orientation(image) != 1:  # exif_transpose would copy even an upright image
        image = ImageOps.exif_transpose(image)
    return _flatten(image).convert("L" if channels == 1 else "RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8: 1 is upright; from 5 on width and height are swapped."""
    found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found


def _resized(image: Image.Image, how: Preprocessing) -> Image.Image:
    side = how.target
    resampling = RESAMPLING[how.interpolation]
    width, height = image.size
    if how.resize == "short" and max(width, height) > MAX_ASPECT * min(width, height):
        message = f"the image is {width} x {height} pixels; a side may be {MAX_ASPECT} times the other at most: crop it"
        raise ImageError("image_too_long", message)
    if how.resize == "crop":
        return image if image.size == (side, side) else ImageOps.fit(image, (side, side), resampling)
    if how.resize in ("stretch", "squash"):
        size = (side, side)
    elif how.resize == "short":  # torchvision's rounding: the long side is cut to a whole number
        size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    else:  # timm's and open_clip's rounding: to the nearest
        ratio = max(width, height) / side
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    if image.size == size:
        return image
    return image.resize(size, resampling) if how.antialias else _sampled(image, size)


def _sampled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize bilinearly between the four nearest pixels, without antialiasing: OpenCV's resize, except for rounding."""

    def taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        place = (np.arange(new) + 0.5) * old / new - 0.5
        below = np.floor(place).astype(np.intp)
        return below.clip(0, old - 1), (below + 1).clip(0, old - 1), place - below

    pixels = np.asarray(image)
    x0, x1, right = taps(image.width, size[0])
    y0, y1, down = taps(image.height, size[1])
    shape = (1, -1) + (1,) * (pixels.ndim - 2)
    rows = [pixels[y][:, x0] * (1 - right.reshape(shape)) + pixels[y][:, x1] * right.reshape(shape) for y in (y0, y1)]
    down = down.reshape((-1, 1) + (1,) * (pixels.ndim - 2))
    return Image.fromarray(np.rint(rows[0] * (1 - down) + rows[1] * down).astype(np.uint8))


def _centre(image: Image.Image, how: Preprocessing) -> Image.Image:
    """The centre square of `size`, padded where the image is smaller.

    If the margin is odd, a crop's half pixel is rounded to even, as in torchvision, or always up and left. The extra
    pixel of padding goes down and right.
    """
    if image.size == (how.size, how.size):
        return image
    offsets = []
    for side in image.size:
        half = (side - how.size) / 2
        offsets.append(-((how.size - side) // 2) if half < 0 else round(half) if how.centre == "round" else int(half))
    left, top = offsets
    if min(image.size) >= how.size:
        return image.crop((left, top, left + how.size, top + how.size))
    fill = how.fill or (0,) * how.channels
    square = Image.new(image.mode, (how.size, how.size), fill if how.channels > 1 else fill[0])
    square.paste(image, (-left, -top))
    return square


def _flatten(image: Image.Image) -> Image.Image:
    """Convert to a mode without palette, transparency or 16-bit samples."""
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
