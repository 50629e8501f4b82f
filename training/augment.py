"""Views: batched augmentation on the device, with every random draw made per image.

torchvision and kornia either draw one set of parameters for a whole batch or loop in Python; here a crop, a resize
and a flip are one affine `grid_sample`, and each colour operation is one tensor expression over the batch.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """How one view is drawn. Probabilities and ranges follow SimCLR's names (Chen et al. 2020, appendix A).

    crop: (least, largest) share of the image's area kept; ratio: aspect ratios of the crop, height over width.
    brightness, contrast: factors are drawn from [1 - x, 1 + x], with probability `jitter`.
    blur: probability of a 3x3 binomial blur, the size that suits images of about 28 pixels.
    erase: probability that a rectangle, each side up to half of the image's, is set to 0 (Zhong et al., AAAI 2020).
    """

    crop: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    blur: float = 0.0
    erase: float = 0.0

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """(n, c, h, w) uint8 -> (n, c, h, w) float32 in [0, 1]; the generator lives on the images' device."""
        x = self._crop(images.float().div_(255), generator)
        if self.blur:
            x = torch.where(_chance(x, self.blur, generator), _binomial(x), x)
        if self.jitter:
            x = torch.where(_chance(x, self.jitter, generator), self._colour(x, generator), x)
        if self.erase:
            x = x.masked_fill(_chance(x, self.erase, generator) & _rectangles(x, generator), 0)
        return x

    def _crop(self, x: Tensor, generator: Generator) -> Tensor:
        n = len(x)
        area = _uniform(n, *self.crop, x, generator)
        ratio = _log_uniform(n, *self.ratio, x, generator)
        height, width = (area * ratio).sqrt().clamp_(max=1), (area / ratio).sqrt().clamp_(max=1)
        centre_y = (1 - height) * _uniform(n, -1, 1, x, generator)
        centre_x = (1 - width) * _uniform(n, -1, 1, x, generator)
        sign = torch.where(_uniform(n, 0, 1, x, generator) < self.flip, -1.0, 1.0)
        zero = torch.zeros_like(width)
        affine = torch.stack([width * sign, zero, centre_x, zero, height, centre_y], dim=1).view(n, 2, 3)
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    def _colour(self, x: Tensor, generator: Generator) -> Tensor:
        n = len(x)
        bright = _uniform(n, 1 - self.brightness, 1 + self.brightness, x, generator).view(n, 1, 1, 1)
        contrast = _uniform(n, 1 - self.contrast, 1 + self.contrast, x, generator).view(n, 1, 1, 1)
        x = x * bright
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return ((x - mean) * contrast + mean).clamp_(0, 1)


def _uniform(n: int, low: float, high: float, like: Tensor, generator: Generator) -> Tensor:
    return torch.empty(n, device=like.device).uniform_(low, high, generator=generator)


def _log_uniform(n: int, low: float, high: float, like: Tensor, generator: Generator) -> Tensor:
    low_log, high_log = torch.tensor([low, high], dtype=torch.float64).log().tolist()
    return _uniform(n, low_log, high_log, like, generator).exp_()


def _chance(x: Tensor, probability: float, generator: Generator) -> Tensor:
    return (_uniform(len(x), 0, 1, x, generator) < probability).view(-1, 1, 1, 1)


def _binomial(x: Tensor) -> Tensor:
    """Blur with the outer product of (1, 2, 1) / 4."""
    tap = x.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(tap, tap).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def _rectangles(x: Tensor, generator: Generator) -> Tensor:
    """(n, 1, h, w) bool: one rectangle an image, anywhere in it, each side uniform up to half of the image's."""
    rows, columns = (_interval(len(x), length, x, generator) for length in x.shape[-2:])
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def _interval(n: int, length: int, like: Tensor, generator: Generator) -> Tensor:
    """(n, length) bool: true on one random interval a row."""
    size = _uniform(n, 0, length / 2, like, generator)
    start = _uniform(n, 0, 1, like, generator) * (length - size)
    position = torch.arange(length, device=like.device)
    return (position >= start.unsqueeze(1)) & (position < (start + size).unsqueeze(1))
