"""One picture in every kind of image file that cameras, browsers and scanners make, and in kinds that are refused."""

import io
from typing import Any

import numpy as np
from PIL import Image

from tests.support.images import SIZE, pictures

GREY = pictures(1, seed=60)[0]
OTHER = pictures(1, seed=61)[0]


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated(form: str) -> bytes:
    """Stored on its side, with an EXIF orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(GREY).rotate(90, expand=True), form, exif=exif)


def transparent() -> bytes:
    """GREY, dimmed, showing through an alpha channel on black: on white it is GREY again."""
    alpha = 255 - GREY
    black = np.zeros((SIZE, SIZE), np.uint8)
    return saved(Image.merge("LA", [Image.fromarray(black), Image.fromarray(alpha)]), "PNG")


FILES: dict[str, tuple[bytes, float]] = {
    # how far, by cosine, from the plain grey file: nothing where the format keeps every pixel
    "RGB PNG": (saved(Image.fromarray(GREY).convert("RGB"), "PNG"), 1e-6),
    "palette PNG": (saved(Image.fromarray(GREY).convert("P"), "PNG"), 1e-6),
    "16-bit PNG": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), 1e-6),
    "GIF": (saved(Image.fromarray(GREY), "GIF"), 1e-6),
    "animated GIF: the first frame": (
        saved(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(OTHER)]),
        1e-6,
    ),
    "animated WebP: the first frame": (
        saved(
            Image.fromarray(GREY).convert("RGB"),
            "WEBP",
            lossless=True,
            save_all=True,
            append_images=[Image.fromarray(OTHER).convert("RGB")],
        ),
        1e-6,
    ),
    "lossless WebP": (saved(Image.fromarray(GREY).convert("RGB"), "WEBP", lossless=True), 1e-6),
    "BMP": (saved(Image.fromarray(GREY), "BMP"), 1e-6),
    "transparent on white": (transparent(), 1e-4),
    "turned by EXIF": (rotated("PNG"), 1e-6),
    "turned by EXIF, JPEG": (rotated("JPEG"), 0.02),
    "CMYK JPEG": (saved(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "JPEG", quality=95), 0.02),
    "progressive JPEG": (saved(Image.fromarray(GREY), "JPEG", quality=95, progressive=True), 0.02),
}
REFUSED = {
    "TIFF": saved(Image.fromarray(GREY), "TIFF"),
    "ICO": saved(Image.fromarray(GREY).convert("RGBA"), "ICO"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="28" height="28"/>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n",
}
