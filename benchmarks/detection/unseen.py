"""Faults and traffic that no rule was made on: written down once the rules were fixed, and run without changing either.

Most are again of the representation, of the weights, of the pixels (within the service, or by the client) and of the
mix of images, but none is in `cases`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.cases import Bench, Case, Draw, kernels, noisy
from models.artifact import Artifact
from models.backbones import Encoder
from models.embedder import Embedder

TOPS, SHOES = (0, 2, 3, 4, 6), (5, 7, 9)


def unseen(bench: Bench, other: Artifact) -> list[Case]:
    """All of them; `other` is another encoder of the same shape, whose weights are served by mistake."""
    return [*_representation(bench), *_weights(bench, other), *_pixels(bench), *_mixes(bench), bench.usual]


def _representation(bench: Bench) -> list[Case]:
    median = bench.clean.median(0).values
    strongest = int(bench.clean.mean(0).argmax())

    def repeated(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[::5] = rows[0]
        return rows

    def stuck(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, strongest] = 1
        return rows

    def lost(rows: Tensor) -> Tensor:
        return rows * (torch.arange(rows.shape[1]) < rows.shape[1] * 7 // 8)

    return [
        bench.changed("units clipped at their median", lambda rows: torch.minimum(rows, median)),
        bench.changed("one unit stuck at 1", stuck),
        bench.changed("the last eighth of units zero", lost),
        bench.changed("a fifth of answers one vector", repeated),
        bench.changed("units squared", torch.square),
        bench.changed("noise of a tenth", lambda rows: rows + 0.1 * _like(rows, bench), False),
    ]


def _like(rows: Tensor, bench: Bench) -> Tensor:
    return F.normalize(torch.randn(rows.shape, generator=bench.generator), dim=1)


def _weights(bench: Bench, other: Artifact) -> list[Case]:
    def negated(share: float) -> Callable[[Encoder], None]:
        def change(encoder: Encoder) -> None:
            for p in kernels(encoder):
                p.mul_(1 - 2.0 * (torch.rand(p.shape, generator=bench.generator) < share))

        return change

    def fresh(part: str) -> Callable[[Encoder], None]:
        def change(encoder: Encoder) -> None:
            for p in kernels(encoder.get_submodule(part)):
                p.copy_(p.std() * torch.randn(p.shape, generator=bench.generator))

        return change

    def unscaled(encoder: Encoder) -> None:
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()

    def bypassed(encoder: Encoder) -> None:
        for p in kernels(encoder.get_submodule("layer4.1")):
            p.zero_()

    def swapped(encoder: Encoder) -> None:
        first, second = encoder.get_submodule("layer4.1.conv1"), encoder.get_submodule("layer4.1.conv2")
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        first.weight, second.weight = second.weight, first.weight

    return [
        bench.forwarded("another encoder's weights", Embedder(other)),
        bench.broken("running statistics lost", unscaled),
        bench.broken("first layer at random", fresh("conv1")),
        bench.broken("last block at random", fresh("layer4.1")),
        bench.broken("last block bypassed", bypassed),
        bench.broken("two layers swapped", swapped),
        *(
            bench.broken(f"weights with {share:.0%} noise", noisy(share, bench.generator), share > 0.1)
            for share in (0.1, 0.3, 1.0)
        ),
        *(bench.broken(f"{share:.0%} of signs flipped", negated(share), share > 0.01) for share in (0.01, 0.1)),
    ]


def _pixels(bench: Bench) -> list[Case]:
    def blurred(images: Tensor) -> Tensor:
        small = F.interpolate(images.float(), size=7, mode="area")
        return F.interpolate(small, size=images.shape[-2:], mode="bilinear").round().to(torch.uint8)

    def noisy(images: Tensor) -> Tensor:
        noise = 40 * torch.randn(images.shape, generator=bench.generator)
        return (images + noise).clamp(0, 255).to(torch.uint8)

    def enlarged(images: Tensor) -> Tensor:
        centre = images[..., 6:-6, 6:-6].float()
        return F.interpolate(centre, size=images.shape[-2:], mode="bilinear").round().to(torch.uint8)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "upside down": lambda images: images.flip(-2),
        "transposed": lambda images: images.transpose(-1, -2).contiguous(),
        "moved by 4 pixels": lambda images: images.roll(4, -1),
        "the centre enlarged": enlarged,
        "contrast halved": lambda images: images // 2 + 64,
        "2 bits a pixel": lambda images: images // 64 * 64,
        "noise on the pixels": noisy,
        "blurred": blurred,
    }
    return bench.each_of(changes)


def _mixes(bench: Bench) -> list[Case]:
    n, shape = len(bench.images), bench.images.shape[1:]
    base = replace(bench.usual, kind="traffic")
    random = torch.randint(256, (n, *shape), generator=bench.generator, dtype=torch.uint8)
    blank = torch.randint(256, (n, 1, 1, 1), generator=bench.generator, dtype=torch.uint8).expand(n, *shape)
    written = _letters(n, shape[-1], bench.generator)

    def of(*classes: int) -> Draw:
        return bench.some(torch.isin(bench.traffic.labels, torch.tensor(classes)).nonzero().flatten())

    few = torch.randperm(n, generator=bench.generator)[:200]

    return [
        replace(base, name="tops only", draw=of(*TOPS)),
        replace(base, name="shoes only", draw=of(*SHOES)),
        *(replace(base, name=f"classes {a} and {b} only", draw=of(a, b)) for a, b in ((0, 1), (2, 9), (3, 8))),
        replace(base, name="no class 8", draw=of(0, 1, 2, 3, 4, 5, 6, 7, 9), strong=False),
        bench.among("letters", written),
        bench.among("a third letters", written, 1 / 3),
        bench.among("5 % letters", written, 0.05),
        bench.among("blank images", blank.contiguous()),
        bench.among("white noise", random),
        replace(base, name="200 images with keys", draw=bench.some(few), strong=False, keyed=frozenset(few.tolist())),
    ]


def _letters(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 1, size, size) uint8 capital letters, light on dark, at random places."""
    font, images = ImageFont.load_default(size * 3 / 4), torch.zeros(count, 1, size, size, dtype=torch.uint8)
    for image in images:
        letter, x, y = (int(torch.randint(k, (1,), generator=generator)) for k in (26, size // 3, size // 4))
        page = Image.new("L", (size, size))
        ImageDraw.Draw(page).text((x, y), chr(ord("A") + letter), fill=255, font=font)
        image[0] = torch.tensor(list(page.tobytes()), dtype=torch.uint8).view(size, size)
    return images
