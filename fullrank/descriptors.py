"""Descriptors of images: a few hundred numbers that say what an image is of and what was done to its pixels.

Thumbnails show what an image is of. They hardly show noise, compression, a lower resolution or exchanged channels:
textures do. The reference compares those of recent traffic with those of healthy images.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["describe", "textures", "thumbnails"]

THUMBNAIL = 8
# A texture is measured on so many rows and columns of an image, and along them in as many parts.
LINES = 8
# Differences of one grey level and less look alike.
_LEVEL = np.float32(1 / 255)
# Textures vary by about 1 in the logarithm. A tenth of that is little beside a thumbnail, so that the variety of the
# inputs stays that of their thumbnails; colours vary by about as much.
_TEXTURE_SCALE = np.float32(0.1)


def thumbnails(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails of 8 x 8 area means: (n, c, s, s) uint8 with s >= 8 -> (n, c * 64) in 0..1."""
    side = pixels.shape[-1]
    edges = np.linspace(0, side, THUMBNAIL + 1).astype(np.intp)
    cells = np.searchsorted(edges, np.arange(side), "right") - 1
    mean = (cells == np.arange(THUMBNAIL)[:, None]) / np.diff(edges)[:, None].astype(np.float32)
    means: NDArray[np.float32] = mean @ pixels.astype(np.float32) @ (mean.T / np.float32(255))
    return means.reshape(len(pixels), pixels.shape[1] * THUMBNAIL**2)


def textures(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How rough images are, and the balance of their colours: (n, c, s, s) uint8 with s >= 8 -> (n, 32 + c - 1).

    Logarithms of mean absolute differences of neighbouring pixels, and of those differences', along 8 rows in eighths
    of their length, then along 8 columns; then the mean differences of neighbouring channels. Of grey levels in 0..1.
    """
    n, channels, side = pixels.shape[:3]
    at = ((np.arange(LINES) + 0.5) * side / LINES).astype(np.intp)
    rows, columns = pixels[:, :, at], pixels[:, :, :, at].swapaxes(2, 3)
    lines = np.stack([them.sum(1, dtype=np.int16) for them in (rows, columns)], 1)
    parts = []
    for order in (1, 2):
        # Over 3 channels and 8 lines these differences add up to less than 2^15.
        rough = np.abs(np.diff(lines, order)).sum(2, dtype=np.int16).astype(np.float32)
        parts.append(np.log(rough @ _eighths(rough.shape[2]) / np.float32(255 * channels * LINES) + _LEVEL))
    roughness = _TEXTURE_SCALE * np.concatenate(parts, 2).reshape(n, -1)
    colours = rows.mean((2, 3), dtype=np.float32) / np.float32(255)
    return np.concatenate((roughness, colours[:, :-1] - colours[:, 1:]), 1)


def _eighths(length: int) -> NDArray[np.float32]:
    """(length, 8) weights of the means over each eighth of so many values, one value at least."""
    starts = np.arange(LINES) * length // LINES
    ends = np.maximum(starts + 1, np.arange(1, LINES + 1) * length // LINES)
    place = np.arange(length)[:, None]
    share = ((place >= starts) & (place < ends)) / (ends - starts)
    return share.astype(np.float32)


def describe(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The descriptors of images: their thumbnails, then their textures, (n, c, s, s) uint8 -> (n, 64 c + 31 + c)."""
    return np.concatenate((thumbnails(pixels), textures(pixels)), 1)


def width(channels: int) -> int:
    """How many values `describe` gives for an image of so many channels."""
    return _thumbnail_width(channels) + 4 * LINES + channels - 1


def _thumbnail_width(channels: int) -> int:
    return channels * THUMBNAIL**2


def thumbnail_part(given: int) -> int:
    """How many of so many values are a thumbnail's, where the others are a texture's; all, of other descriptors."""
    return next((_thumbnail_width(c) for c in (1, 3) if width(c) == given), given)


def alike(width: int, other: int | None) -> bool:
    """Whether descriptors of these widths are of the same kind of images, be it with textures or without."""
    return other is not None and thumbnail_part(width) == thumbnail_part(other)
