"""A second list of faults and traffic, of other kinds than those in `cases` and `unseen`: written down before any was
run, to judge the rule that followed from `unseen`."""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.cases import Bench, Case, kernels
from models.artifact import Artifact
from models.backbones import Encoder

LIGHT_SHARE = 0.2


def fresh(bench: Bench, other: Artifact) -> list[Case]:
    """All of them; `other` is another encoder of the same shape, a part of whose weights is served by mistake."""
    return [*_answers(bench), *_weights(bench, other), *_pixels(bench), *_traffic(bench), bench.usual]


def _answers(bench: Bench) -> list[Case]:
    d = bench.dimension
    order = torch.randperm(d, generator=bench.generator)
    top = float(bench.clean.max())

    def blended(rows: Tensor) -> Tensor:
        return rows + rows.roll(1, 0)

    def wrapped(rows: Tensor) -> Tensor:
        # A scale that leaves half the range: what is beyond it comes out negative.
        return (rows + top / 2).remainder(top) - top / 2

    def dropped(rows: Tensor) -> Tensor:
        return rows * (torch.rand(rows.shape, generator=bench.generator) > 0.2)

    def negated(rows: Tensor) -> Tensor:
        return rows * (1 - 2.0 * (torch.arange(d) % 4 == 0))

    def short(rows: Tensor) -> Tensor:
        return rows.to(torch.float8_e4m3fn).float()

    return [
        bench.changed("each answer handed to the next request", lambda rows: rows.roll(1, 0)),
        bench.changed("answers blended with their neighbours", blended),
        bench.changed("units in another order", lambda rows: rows[:, order]),
        bench.changed("every fourth unit negated", negated),
        bench.changed("integers wrapped round", wrapped),
        bench.changed("a fifth of values dropped at random", dropped),
        bench.changed("8-bit floating-point answers", short, False),
    ]


def _weights(bench: Bench, other: Artifact) -> list[Case]:
    def partly(part: str) -> Callable[[Encoder], None]:
        def change(encoder: Encoder) -> None:
            encoder.get_submodule(part).load_state_dict(other.encoder.get_submodule(part).state_dict())

        return change

    def averaged(share: float) -> Callable[[Encoder], None]:
        def change(encoder: Encoder) -> None:
            for p, q in zip(encoder.parameters(), other.encoder.parameters(), strict=True):
                p.lerp_(q, share)

        return change

    def louder(encoder: Encoder) -> None:
        for module in encoder.get_submodule("layer3").modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(1.5)

    def unbiased(encoder: Encoder) -> None:
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.zero_()

    def mirrored(encoder: Encoder) -> None:
        for p in kernels(encoder):
            p.copy_(p.transpose(-1, -2).contiguous())

    def pruned(encoder: Encoder) -> None:
        for p in kernels(encoder):
            p[p.abs() < p.abs().median()] = 0

    return [
        bench.broken("the second layer another encoder's", partly("layer2")),
        bench.broken("weights averaged with another encoder's", averaged(0.3)),
        bench.broken("the third layer's scales half as large again", louder),
        bench.broken("biases lost", unbiased),
        bench.broken("kernels transposed", mirrored),
        bench.broken("the smaller half of the weights pruned", pruned),
    ]


def _pixels(bench: Bench) -> list[Case]:
    size = bench.images.shape[-1]

    def gamma(images: Tensor) -> Tensor:
        return (255 * (images.float() / 255).pow(2.2)).round().to(torch.uint8)

    def compressed(images: Tensor) -> Tensor:
        kept = torch.empty_like(images)
        for image, out in zip(images, kept, strict=True):
            data = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(data, "JPEG", quality=8)
            out[0] = torch.tensor(list(Image.open(data).tobytes()), dtype=torch.uint8).view(size, size)
        return kept

    def framed(images: Tensor) -> Tensor:
        inner = size * 5 // 7
        small = F.interpolate(images.float(), size=inner, mode="bilinear", antialias=True).round().to(torch.uint8)
        border = (size - inner) // 2
        return F.pad(small, (border, size - inner - border) * 2)

    def covered(images: Tensor) -> Tensor:
        images, side = images.clone(), size * 3 // 7
        for image in images:
            x, y = (int(torch.randint(size - side, (1,), generator=bench.generator)) for _ in range(2))
            image[:, y : y + side, x : x + side] = 0
        return images

    def interlaced(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., 1::2, :] = 0
        return images

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "gamma of 2.2": gamma,
        "JPEG of quality 8": compressed,
        "a black border": framed,
        "squares blacked out": covered,
        "every second line black": interlaced,
    }
    return bench.each_of(changes)


def _traffic(bench: Bench) -> list[Case]:
    n, size = len(bench.images), bench.images.shape[-1]
    base = replace(bench.usual, kind="traffic")
    across = torch.arange(size) / size

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=bench.generator)).view(n, 1, 1, 1)

    angle, turns, phase = uniform(0, math.pi), uniform(2, 7), uniform(0, 2 * math.pi)
    along = angle.cos() * across + angle.sin() * across.view(-1, 1)
    gratings = (127.5 * (1 + (2 * math.pi * turns * along + phase).sin())).to(torch.uint8)
    slopes = (255 * (0.5 + (along - along.mean((2, 3), keepdim=True)) * uniform(-1, 1))).clamp(0, 255).to(torch.uint8)
    x, y, radius = uniform(0.3, 0.7), uniform(0.3, 0.7), uniform(0.1, 0.3)
    distance = ((across - x).square() + (across.view(-1, 1) - y).square()).sqrt()
    discs = (255 * (distance < radius) * uniform(0.4, 1)).to(torch.uint8)
    order = torch.randperm(n, generator=bench.generator)
    doubled = ((bench.images.float() + bench.images[order]) / 2).to(torch.uint8)
    quarter = F.interpolate(bench.images.float(), size=size // 2, mode="area").to(torch.uint8)
    sheet = torch.cat((quarter, quarter.roll(1, 0)), -1)
    sheets = torch.cat((sheet, sheet.roll(2, 0)), -2)
    captioned = bench.images.clone()
    captioned[..., -size // 4 :, :] = 255
    light = bench.images.float().mean((1, 2, 3)).argsort(descending=True)[: int(LIGHT_SHARE * n)]
    dark = bench.images.float().mean((1, 2, 3)).argsort()[: int(LIGHT_SHARE * n)]

    return [
        bench.among("gratings", gratings),
        bench.among("a third gratings", gratings, 1 / 3),
        bench.among("slopes of grey", slopes),
        bench.among("discs", discs),
        bench.among("two images in one", doubled),
        bench.among("sheets of four images", sheets),
        bench.among("a white caption", captioned),
        replace(base, name="the lightest fifth", draw=bench.some(light)),
        replace(base, name="the darkest fifth", draw=bench.some(dark)),
    ]
