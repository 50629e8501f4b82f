"""Decodes the bytes of an image file to a Pillow image, within limits on its size and its cost."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from models import headers

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MIN_SIDE = 8
MAX_PIXELS = 64_000_000
# Limit on pixels times scans of a JPEG: each scan may visit every pixel. Libraries write at most a dozen scans.
MAX_SCANNED_PIXELS = 12 * MAX_PIXELS


class ImageError(ValueError):
    """Raised for bytes that are no usable image. `code` is a stable name for programs; the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def opened(
    data: bytes, *, draft: int = 0, max_pixels: int = MAX_PIXELS, max_whole_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Open the image in `data` for a `with` block. Any exception of Pillow in the block becomes an ImageError.

    The header's width x height is checked before any pixel is allocated. To save work, a JPEG may be decoded at an
    eighth, a quarter or half its size, as long as neither side falls below `draft`; 0 decodes it in full. Other formats
    are always decoded in full, so `max_whole_pixels` limits them too. Refused are a JPEG whose scans visit too many
    pixels and a run-length encoded BMP: a few bytes of either cost seconds.
    """
    if not data:
        raise ImageError("empty_image", "the image is empty (0 bytes); send the bytes of an image file")
    if headers.rle_bitmap(data):
        message = "run-length encoded BMP files are not decoded; save it as PNG, or as BMP without compression"
        raise ImageError("rle_bitmap", message)
    whole = min(max_pixels, max_whole_pixels)
    if headers.format_of(data) == "WEBP" and (declared := headers.webp_pixels(data)[0]) > whole:
        # Check this before Pillow opens the file: opening alone allocates two canvases.
        raise _too_large(f"{declared} pixels", whole)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            jpeg = image.format in ("JPEG", "MPO")
            check_size(*image.size, max_pixels if jpeg else whole)
            if jpeg:
                _check_scans(data, *image.size)
            if draft:
                image.draft(None, (draft, draft))
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        message = f"the image declares far more than the limit of {max_pixels} pixels in all: scale it down first"
        raise ImageError("image_too_large", message) from error
    except UnidentifiedImageError as error:
        if (name := headers.known_as(data)) is not None:
            message = f"this is {name}, which is not decoded; send one of {', '.join(FORMATS)}"
            raise ImageError("not_an_image", message) from error
        raise ImageError("not_an_image", f"the bytes are no image in a known format ({', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise ImageError("image_too_costly", "the image needs too much memory: scale it down first") from error
    # On hostile bytes Pillow's decoders may raise any exception. All of them mean a damaged file.
    except Exception as error:
        raise ImageError("damaged_image", f"the image is truncated or damaged: {error}") from error


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError for more pixels than the limit, or for a side too short to be an image."""
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height} pixels", max_pixels)
    if min(width, height) < MIN_SIDE:
        message = f"the image is {width} x {height} pixels; each side needs at least {MIN_SIDE}"
        raise ImageError("image_too_small", message)


def _check_scans(data: bytes, width: int, height: int) -> None:
    pixels = headers.padded_pixels(width, height)
    if len(data) // 2 * pixels <= MAX_SCANNED_PIXELS:  # a scan begins with two bytes: there is no need to count
        return
    scans = headers.scans(data)
    if scans * pixels > MAX_SCANNED_PIXELS:
        message = f"the JPEG visits its {width} x {height} pixels in {scans} scans; save it anew, with a dozen at most"
        raise ImageError("too_many_scans", message)


def _too_large(size: str, limit: int) -> ImageError:
    message = f"the image is {size}; the limit is {limit} in all: scale it down first"
    return ImageError("image_too_large", message)
