"""Batched augmentation on the device, with random parameters for each image. An augmented image is called a view.

torchvision draws one set of parameters for a whole batch and kornia loops in Python; here a crop, a resize and a flip
are one affine `grid_sample`, each colour operation is one expression over the batch, and a Gaussian blur is two small
matrix products. All of a view's randomness is drawn on the CPU, a few numbers an image, and moved in one copy: the same
seed gives the same views on any device, and drawing never waits for an accelerator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

ATTEMPTS = 10


class Draw(NamedTuple):
    """The random parameters of one view, (n,) each. An operation not chosen has the value that does nothing."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    sign: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    sigma: Tensor
    solarise: Tensor


@dataclass(frozen=True)
class Augmentation:
    """The settings of an augmentation. Names and meanings are those of SimCLR (Chen et al. 2020, A) and torchvision.

    crop: (least, largest) share of the image's area kept; ratio: aspect ratios of the crop, width over height.
    brightness, contrast, saturation: factors from [1 - x, 1 + x]; hue: a shift from [-x, x] turns; in random order,
    with probability `jitter`. grey, blur, solarise, flip: probabilities. sigma: range of the blur's deviation in
    pixels, its kernel a tenth of the image's side. On images of one channel saturation, hue and grey do nothing.
    """

    crop: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0

    def __call__(self, images: Tensor, generator: Generator, cropped: bool = False, size: int | None = None) -> Tensor:
        """(n, c, h, w) uint8 -> (n, c, size, size) float32 in [0, 1], by default of the images' own size.

        The generator is on the CPU. `cropped` images were cropped and resized when they were decoded, so that only the
        flip is left to do.
        """
        draw, order = self.draw(len(images), generator)
        packed = torch.stack(draw)
        if images.device.type == "cuda":
            packed = packed.pin_memory().to(images.device, non_blocking=True)
        d = Draw._make(packed.view(len(Draw._fields), -1, 1, 1, 1).unbind())
        x = images.float().div_(255)
        x = torch.where(d.sign < 0, x.flip(-1), x) if cropped else crop_and_flip(x, d, size)
        colour = x.shape[1] == 3
        if self.jitter:
            for name in order:
                if (colour or name in ("brightness", "contrast")) and getattr(self, name):
                    x = OPERATIONS[name](x, getattr(d, name))
        if self.grey and colour:
            x = torch.lerp(x, luma(x), d.grey)
        if self.blur:
            x = gaussian_blur(x, d.sigma.flatten())
        if self.solarise:
            x = torch.where((d.solarise > 0) & (x >= 0.5), 1 - x, x)
        return x

    def draw(self, n: int, generator: Generator) -> tuple[Draw, list[str]]:
        """The random numbers of one view of n images, and the order of its colour operations."""

        def chance(probability: float) -> Tensor:
            return torch.rand(n, generator=generator) < probability

        def around(centre: float, spread: float) -> Tensor:
            return torch.where(jittered, centre + spread * (2 * torch.rand(n, generator=generator) - 1), centre)

        top, left, height, width = crop_boxes(n, self.crop, self.ratio, generator).unbind(1)
        sign = torch.where(chance(self.flip), -1.0, 1.0)
        jittered = chance(self.jitter)
        draw = Draw(
            top=top,
            left=left,
            height=height,
            width=width,
            sign=sign,
            brightness=around(1, self.brightness),
            contrast=around(1, self.contrast),
            saturation=around(1, self.saturation),
            hue=around(0, self.hue),
            grey=chance(self.grey).float(),
            sigma=uniform(n, *self.sigma, generator) * chance(self.blur),
            solarise=chance(self.solarise).float(),
        )
        order = [list(OPERATIONS)[i] for i in torch.randperm(len(OPERATIONS), generator=generator).tolist()]
        return draw, order


def uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def crop_boxes(
    n: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator, shape: float = 1.0
) -> Tensor:
    """Random crops: boxes (n, 4) of top, left, height, width, as shares of an image of aspect ratio `shape`.

    torchvision's RandomResizedCrop: area uniform, aspect ratio log-uniform, up to ten attempts at a box that fits,
    then the largest centred box of the nearest allowed ratio.
    """
    area = uniform(n * ATTEMPTS, *scale, generator)
    aspect = uniform(n * ATTEMPTS, math.log(ratio[0]), math.log(ratio[1]), generator).exp() / shape
    width = (area * aspect).sqrt().view(n, -1)
    height = (area / aspect).sqrt().view(n, -1)
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)
    nearest = min(max(shape, ratio[0]), ratio[1]) / shape
    some = fits.any(1)
    width = torch.where(some, width.gather(1, first).flatten(), min(1.0, nearest))
    height = torch.where(some, height.gather(1, first).flatten(), min(1.0, 1 / nearest))
    where = torch.rand(2, n, generator=generator)
    where = torch.where(some, where, 0.5)
    return torch.stack([where[0] * (1 - height), where[1] * (1 - width), height, width], dim=1)


def crop_and_flip(x: Tensor, d: Draw, size: int | None = None) -> Tensor:
    """Crop each image to its box, flip it where sign is -1, and resample it bilinearly to `size` (default: its own)."""
    n = len(x)
    zero = torch.zeros_like(d.width)
    rows = [d.width * d.sign, zero, 2 * d.left + d.width - 1, zero, d.height, 2 * d.top + d.height - 1]
    affine = torch.cat(rows, dim=-1).view(n, 2, 3)
    shape = [n, x.shape[1], size or x.shape[2], size or x.shape[3]]
    grid = F.affine_grid(affine, shape, align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def luma(x: Tensor) -> Tensor:
    """Grey values (n, 3, h, w) -> (n, 1, h, w) by ITU-R 601, as Pillow's mode L. One channel is returned as it is."""
    if x.shape[1] == 1:
        return x
    r, g, b = torch.split(x, 1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from the mean of the image's grey version by `factor`."""
    return torch.lerp(luma(x).mean(dim=(1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its own grey value by `factor`."""
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue (of HSV) by `shift` turns; saturation and value do not change. x: (n, 3, h, w) in [0, 1]."""
    r, g, b = torch.split(x, 1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = chroma.clamp_min(1e-8)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    # f(k) = value - chroma max(0, min(k, 4 - k, 1)) at k = (5, 3, 1) + hue in sextants: red, green and blue.
    k = torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + sextant + 6 * shift
    k = k.remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": shift_hue,
}


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own deviation (n,) in pixels, 0 for none; reflected at the borders.

    A blur along one axis is a product with a banded matrix, so that n different kernels are one batched product.
    """
    n, c, h, w = x.shape
    rows, columns = (_blur_matrices(length, max(1, length // 20), sigma) for length in (h, w))
    across = torch.bmm(x.reshape(n, c * h, w), columns.mT).view(n, c, h, w)
    return torch.matmul(rows.unsqueeze(1), across)


def _blur_matrices(length: int, radius: int, sigma: Tensor) -> Tensor:
    """(n, length, length): row i holds the weights that output i gives every input."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-4).unsqueeze(1)).square())
    kernels = kernels / kernels.sum(1, keepdim=True)
    return (kernels @ _taps(length, radius, sigma.device)).view(-1, length, length)


@cache
def _taps(length: int, radius: int, device: torch.device) -> Tensor:
    """(2 radius + 1, length^2): which input each tap of each output reads, reflected at the borders."""
    outputs = torch.arange(length)
    reads = [(outputs + t).abs() for t in range(-radius, radius + 1)]
    reads = [torch.where(r >= length, 2 * (length - 1) - r, r) for r in reads]
    return torch.stack([F.one_hot(r, length).float().flatten() for r in reads]).to(device)


SIMCLR = Augmentation(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5)
"""Chen et al. 2020, appendix A, colour distortion of strength 1; DirectCLR's too."""
SIMCLR_CIFAR = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2)
"""Appendix B.9: strength 0.5, no blur."""
BYOL_FIRST = Augmentation(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2, blur=1.0)
BYOL_SECOND = replace(BYOL_FIRST, blur=0.1, solarise=0.2)
"""Grill et al. 2020, table 6, T and T'; Barlow Twins' too."""
SIMSIAM = Augmentation(crop=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5)
SIMSIAM_CIFAR = replace(SIMSIAM, blur=0.0)
"""Chen & He 2021, section 3 and appendix D; MoCo v2's."""
VICREG = replace(BYOL_FIRST, blur=0.5, solarise=0.1)
"""BYOL's operations, both views alike, as lightly's VICRegTransform has them from the paper's appendix."""
