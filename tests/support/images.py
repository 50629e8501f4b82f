"""Images made from a seed, and their files."""

import io

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
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
