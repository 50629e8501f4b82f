"""From the bytes of an image file to a Pillow image, within limits, or an ImageError that says what is wrong."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MIN_SIDE = 8
MAX_PIXELS = 64_000_000


class ImageError(ValueError):
    """Bytes that cannot become an input. `code` is a stable machine-readable name, the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def opened(data: bytes, *, draft: int = 0, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The image in `data`, open for the length of the `with` block; whatever Pillow raises in it is an ImageError.

    The header's width x height is checked before any pixel is allocated. A JPEG may be decoded at an eighth, a quarter
    or half its size, for as little of the work, as long as neither side falls below `draft`; 0 decodes all of it.
    """
    if not data:
        raise ImageError("empty_image", "the image is empty (0 bytes); send the bytes of an image file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, max_pixels)
            if draft:
                image.draft(None, (draft, draft))
            yield image
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


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError for more pixels than the limit, or for a side too short to be an image."""
    if width * height > max_pixels:
        message = f"the image is {width} x {height} pixels; the limit is {max_pixels} in all: scale it down first"
        raise ImageError("image_too_large", message)
    if min(width, height) < MIN_SIDE:
        message = f"the image is {width} x {height} pixels; each side needs at least {MIN_SIDE}"
        raise ImageError("image_too_small", message)
