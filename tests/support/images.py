"""Images made from a seed, as files and as request bodies."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

SIZE, DIMENSION = 28, 32


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    """The file of an image, or of an array of pixels."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (28, 28), mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Detail at every scale with a photograph's falling spectrum, unlike noise, which no two resizes agree on."""
    rng, total = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(small.resize(size, Image.Resampling.BICUBIC)) - 127.5) * (2 / cells**0.7)
    return Image.fromarray((127.5 + total / 2).clip(0, 255).astype(np.uint8))


def pictures(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """(count, size, size) uint8: gratings of random direction, frequency and contrast, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    angle, frequency, phase, contrast = rng.uniform([[0], [1], [0], [20]], [[3.1], [7], [6.3], [120]], (4, count))
    wave = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    signal = 128 + contrast[:, None, None] * np.sin(6.3 * frequency[:, None, None] * wave + phase[:, None, None])
    return (signal + rng.normal(0, 8, signal.shape)).clip(0, 255).astype(np.uint8)


def as_json(images: list[bytes], **fields: Any) -> dict[str, Any]:
    """The JSON body of POST /embed."""
    return {"images": [base64.b64encode(image).decode() for image in images], **fields}


def as_files(images: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """The multipart parts of POST /embed."""
    return [("images", (f"{i}.png", image)) for i, image in enumerate(images)]
