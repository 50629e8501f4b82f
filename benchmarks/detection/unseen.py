"""Faults and traffic that no rule was made on: written down once the rules were fixed, and run without changing either.

Most are again of the representation, of the weights, of the pixels (within the service, or by the client) and of the
mix of images, but none is in `cases`.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.cases import Bench, Case, Draw
from fullrank.inputs import thumbnails
from models.artifact import Artifact
from models.backbones import ResNet
from models.embedder import Embedder

TOPS, SHOES = (0, 2, 3, 4, 6), (5, 7, 9)


def unseen(bench: Bench, other: Artifact) -> list[Case]:
    """All of them; `other` is another encoder of the same shape, whose weights are served by mistake."""
    healthy = Case("healthy", "none", bench.clean, bench.inputs, bench.canary)
    return [*_representation(bench), *_weights(bench, other), *_pixels(bench), *_mixes(bench), healthy]


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
    def broken(name: str, change: Callable[[ResNet], None], strong: bool = True) -> Case:
        artifact = copy.deepcopy(bench.artifact)
        with torch.no_grad():
            change(artifact.encoder)
        return bench.forwarded(name, Embedder(artifact), strong)

    def noisy(share: float) -> Callable[[ResNet], None]:
        def change(encoder: ResNet) -> None:
            for p in _kernels(encoder):
                p.add_(share * p.std() * torch.randn(p.shape, generator=bench.generator))

        return change

    def negated(share: float) -> Callable[[ResNet], None]:
        def change(encoder: ResNet) -> None:
            for p in _kernels(encoder):
                p.mul_(1 - 2.0 * (torch.rand(p.shape, generator=bench.generator) < share))

        return change

    def fresh(part: str) -> Callable[[ResNet], None]:
        def change(encoder: ResNet) -> None:
            for p in _kernels(encoder.get_submodule(part)):
                p.copy_(p.std() * torch.randn(p.shape, generator=bench.generator))

        return change

    def unscaled(encoder: ResNet) -> None:
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()

    def bypassed(encoder: ResNet) -> None:
        for p in _kernels(encoder.get_submodule("layer4.1")):
            p.zero_()

    def swapped(encoder: ResNet) -> None:
        first, second = encoder.get_submodule("layer4.1.conv1"), encoder.get_submodule("layer4.1.conv2")
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        first.weight, second.weight = second.weight, first.weight

    return [
        bench.forwarded("another encoder's weights", Embedder(other)),
        broken("running statistics lost", unscaled),
        broken("first layer at random", fresh("conv1")),
        broken("last block at random", fresh("layer4.1")),
        broken("last block bypassed", bypassed),
        broken("two layers swapped", swapped),
        *(broken(f"weights with {share:.0%} noise", noisy(share), share > 0.1) for share in (0.1, 0.3, 1.0)),
        *(broken(f"{share:.0%} of signs flipped", negated(share), share > 0.01) for share in (0.01, 0.1)),
    ]


def _kernels(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.ndim == 4]


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
    return [case for name, change in changes.items() for case in bench.pixels(name, change)]


def _mixes(bench: Bench) -> list[Case]:
    n, shape = len(bench.images), bench.images.shape[1:]
    base = Case("", "traffic", bench.clean, bench.inputs, bench.canary)
    random = torch.randint(256, (n, *shape), generator=bench.generator, dtype=torch.uint8)
    blank = torch.randint(256, (n, 1, 1, 1), generator=bench.generator, dtype=torch.uint8).expand(n, *shape)
    written = _letters(n, shape[-1], bench.generator)

    def of(*classes: int) -> Draw:
        rows = torch.isin(bench.traffic.labels, torch.tensor(classes)).nonzero().flatten()
        return lambda m: rows[torch.randint(len(rows), (m,), generator=bench.generator)]

    def among(name: str, images: Tensor, share: float = 1.0) -> Case:
        rows, seen = bench.embed(images), torch.from_numpy(thumbnails(images.numpy()))
        pool, inputs = torch.cat((rows, bench.clean)), torch.cat((seen, bench.inputs))

        def draw(m: int) -> Tensor:
            index = bench.traffic.independent(m)
            return torch.where(torch.rand(m, generator=bench.generator) < share, index, index + n)

        return replace(base, name=name, pool=pool, inputs=inputs, draw=draw, strong=share > 0.1)

    few = torch.randperm(n, generator=bench.generator)[:200]

    def again(m: int) -> Tensor:
        return few[torch.randint(len(few), (m,), generator=bench.generator)]

    return [
        replace(base, name="tops only", draw=of(*TOPS)),
        replace(base, name="shoes only", draw=of(*SHOES)),
        *(replace(base, name=f"classes {a} and {b} only", draw=of(a, b)) for a, b in ((0, 1), (2, 9), (3, 8))),
        replace(base, name="no class 8", draw=of(0, 1, 2, 3, 4, 5, 6, 7, 9), strong=False),
        among("letters", written),
        among("a third letters", written, 1 / 3),
        among("5 % letters", written, 0.05),
        among("blank images", blank.contiguous()),
        among("white noise", random),
        replace(base, name="200 images with keys", draw=again, strong=False, keyed=frozenset(few.tolist())),
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
