"""Changes of pixels that textures were not made on, written down and committed before any was run.

Each sits once in the service and once at the client. None is in another list. The strong ones were decided before the
run as well: those that a person would call another picture, or a broken one.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.detection.cases import Bench, Case
from benchmarks.detection.preprocessing import jpeg
from models.artifact import Artifact

BAYER = torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16
WEAK = ("mirrored", "noise of 8 levels", "JPEG of quality 40", "3 bits a pixel", "contrast 0.8", "a logo in a corner")


def blind(bench: Bench, other: Artifact) -> list[Case]:
    """All of them, and healthy traffic; `other` is not used."""
    colours = _colours() if bench.images.shape[1] == 3 else {}
    cases = bench.each_of(_plain(bench) | colours)
    return [*(replace(case, strong=not case.name.startswith(WEAK)) for case in cases), bench.usual]


def _plain(bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """Nineteen changes of any image, (n, c, s, s) uint8."""
    size = bench.images.shape[-1]
    sixteenth, eighth, half = max(1, size // 16), size // 8, size // 2

    def mapped(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda images: change(images.float()).round().clamp(0, 255).to(torch.uint8)

    def box(images: Tensor, height: int, width: int) -> Tensor:
        padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
        return F.avg_pool2d(padded, (height, width), stride=1)

    def smaller(images: Tensor) -> Tensor:
        less = F.interpolate(images, size=size * 3 // 4, mode="bilinear", antialias=True)
        return F.interpolate(less, size=size, mode="bilinear")

    def sheared(images: Tensor) -> Tensor:
        shear = torch.tensor([[1.0, 0.176, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
        grid = F.affine_grid(shear, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def nearer(images: Tensor) -> Tensor:
        inner = slice(sixteenth, -sixteenth)
        return F.interpolate(images[..., inner, inner], size=size, mode="bilinear")

    def framed(images: Tensor) -> Tensor:
        images = images.clone()
        for edge in (slice(0, sixteenth), slice(-sixteenth, None)):
            images[..., edge, :] = 90
            images[..., edge] = 90
        return images

    def ruled(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., ::eighth, :] = 255
        return images

    def dead(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., 2 :: max(3, size // 6)] = 0
        return images

    def darkened(images: Tensor) -> Tensor:
        along = torch.linspace(-1, 1, size).square()
        return images * (1 - 0.35 * (along[:, None] + along))

    def marked(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., -eighth - 1 : -1, -eighth - 1 : -1] = 255
        return images

    def tiled(images: Tensor) -> Tensor:
        top = torch.cat((images[..., half:, half:], images[..., half:, :half]), -1)
        return torch.cat((top, torch.cat((images[..., :half, half:], images[..., :half, :half]), -1)), -2)

    def dithered(images: Tensor) -> Tensor:
        threshold = BAYER.repeat(size // 4 + 1, size // 4 + 1)[:size, :size]
        return ((images / 85 + threshold - 0.5).round() * 85).clamp(0, 255)

    def stretched(images: Tensor) -> Tensor:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        return (images - low) * 255 / (high - low).clamp(min=1)

    def torn(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., 1::2, :] = images[..., 1::2, :].roll(sixteenth, -1)
        return images

    def grained(images: Tensor) -> Tensor:
        return images + 8 * torch.randn(images.shape, generator=bench.generator)

    return {
        "sharpened": mapped(lambda images: 2 * images - box(images, 3, 3)),
        "3 bits a pixel": lambda images: (images >> 5) * 36,
        "contrast 0.8": mapped(lambda images: 128 + 0.8 * (images - 128)),
        "noise of 8 levels": mapped(grained),
        "blurred along its rows": mapped(lambda images: box(images, 1, 5)),
        "three quarters of the resolution": mapped(smaller),
        "JPEG of quality 40": lambda images: jpeg(images, 40),
        "sheared by 10 degrees": mapped(sheared),
        "an eighth nearer": mapped(nearer),
        "a grey frame": framed,
        "white rules": ruled,
        "dead columns": dead,
        "dark corners": mapped(darkened),
        "a logo in a corner": marked,
        "quarters exchanged": tiled,
        "dithered to 2 bits": mapped(dithered),
        "stretched to all levels": mapped(stretched),
        "every second line moved": torn,
        "mirrored": lambda images: images.flip(-1),
    }


def _colours() -> dict[str, Callable[[Tensor], Tensor]]:
    """Four changes of colour."""

    def toward_grey(share: float) -> Callable[[Tensor], Tensor]:
        def change(images: Tensor) -> Tensor:
            grey = images.float().mean(1, keepdim=True)
            return (share * grey + (1 - share) * images.float()).round().to(torch.uint8)

        return change

    def turned(images: Tensor) -> Tensor:
        return (0.7 * images.float() + 0.3 * images.float().roll(1, 1)).round().to(torch.uint8)

    def fringed(images: Tensor) -> Tensor:
        step = max(1, images.shape[-1] // 16)
        return torch.cat((images[:, :1].roll(step, -1), images[:, 1:]), 1)

    return {
        "half of the colour": toward_grey(0.5),
        "grey for colour": toward_grey(1.0),
        "hues turned": turned,
        "colour fringes": fringed,
    }
