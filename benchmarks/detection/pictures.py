"""Images that are not of the catalogue, and what clients do to those that are: (n, c, s, s) uint8."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def noise(n: int, shape: torch.Size, generator: Generator) -> Tensor:
    """Every value alike and independent."""
    return torch.randint(256, (n, *shape[1:]), generator=generator, dtype=torch.uint8)


def grained(images: Tensor, generator: Generator) -> Tensor:
    """With a sensor's noise of 6 levels."""
    return _pixels(images + 6 * torch.randn(images.shape, generator=generator))


def blank(n: int, shape: torch.Size, generator: Generator) -> Tensor:
    """Light greys of any level, with a sensor's noise."""
    levels = 150 + 100 * torch.rand(n, 1, 1, 1, generator=generator)
    return grained(levels.expand(n, *shape[1:]), generator)


def no_image(shape: torch.Size) -> Tensor:
    """One tile: a light ground, a grey frame and a cross."""
    side = shape[-1]
    at = torch.arange(side)
    edge = (at < 2) | (at >= side - 2)
    across = (at[:, None] - at).abs() < 1
    dark = edge[:, None] | edge | across | across.flip(0)
    return _pixels(torch.where(dark, 150.0, 230.0).expand(1, *shape[1:]))


def logos(n: int, shape: torch.Size, generator: Generator) -> Tensor:
    """A disc, diamond or square, full or hollow, in one colour on another."""
    channels, side = shape[1], shape[-1]
    at = torch.linspace(-1, 1, side).abs()
    x, y = at[None, :], at[:, None]
    distances = torch.stack(((x.square() + y.square()).sqrt(), x + y, torch.maximum(x, y)))
    distance = distances[torch.randint(3, (n,), generator=generator)][:, None]
    outer = 0.4 + 0.5 * torch.rand(n, 1, 1, 1, generator=generator)
    inner = outer * 0.6 * torch.randint(2, outer.shape, generator=generator)
    ground, figure = 255 * torch.rand(2, n, channels, 1, 1, generator=generator)
    return _pixels(torch.where((distance <= outer) & (distance >= inner), figure, ground))


def screenshots(n: int, shape: torch.Size, generator: Generator) -> Tensor:
    """Lines of dark marks of unequal length on a light ground, beneath a grey bar."""
    side = shape[-1]
    line = torch.arange(side) // 4
    length = side * (0.3 + 0.6 * torch.rand(n, side, generator=generator))[:, line]
    ink = torch.rand(n, side, side, generator=generator) < 0.6
    text = ink & (torch.arange(side) < length[..., None]) & (torch.arange(side) % 4 < 2)[:, None]
    pages = torch.where(text, 40.0, 250.0)
    pages[:, : side // 8] = 180
    return _pixels(pages[:, None].expand(n, *shape[1:]))


def collages(images: Tensor) -> Tensor:
    """Each with the three before it, at half of the size."""
    small = F.interpolate(images.float(), size=images.shape[-1] // 2, mode="area")
    top, bottom = (torch.cat((small.roll(i, 0), small.roll(i + 1, 0)), -1) for i in (0, 2))
    return _pixels(torch.cat((top, bottom), -2))


def zoomed(images: Tensor) -> Tensor:
    """The inner three quarters, enlarged."""
    eighth = images.shape[-1] // 8
    inner = images[..., eighth:-eighth, eighth:-eighth].float()
    return _pixels(F.interpolate(inner, size=images.shape[-1], mode="bilinear"))


def burst(images: Tensor, n: int, generator: Generator) -> Tensor:
    """n views of few images: up to a fifth nearer, moved by up to a twentieth of the side, of other light."""
    chosen = images[torch.randint(len(images), (n,), generator=generator)].float()
    scale, x, y, light = torch.rand(4, n, generator=generator)
    frame = torch.zeros(n, 2, 3)
    frame[:, 0, 0] = frame[:, 1, 1] = 1 - 0.2 * scale
    frame[:, 0, 2], frame[:, 1, 2] = 0.2 * x - 0.1, 0.2 * y - 0.1
    grid = F.affine_grid(frame, list(chosen.shape), align_corners=False)
    seen = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
    return _pixels(seen * (0.95 + 0.1 * light[:, None, None, None]))


def _pixels(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8).contiguous()
