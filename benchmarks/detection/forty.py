"""Forty more cases, written down and committed before any was run: answers, weights, pixels, traffic and harmless.

None is in `cases`, `unseen`, `fresh` or `preprocessing`. Most need the answers or the pixels alone, so that they can be
run on an encoder of any architecture; those of the weights need convolutions, one of them batch normalisation too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detection.cases import Bench, Case, RowsBench, kernels, rounded
from models.artifact import Artifact
from models.backbones import Encoder

FIFTH = 0.2


def forty(bench: Bench, other: Artifact) -> list[Case]:
    """All of them, and healthy traffic; `other` is not used.

    Of rows without their encoder, those of the answers alone."""
    if isinstance(bench, RowsBench):
        return [*_answers(bench), *_harmless(bench), bench.usual]
    return [*_answers(bench), *_weights(bench), *_pixels(bench), *_traffic(bench), *_harmless(bench), bench.usual]


def _answers(bench: Bench) -> list[Case]:
    """Thirteen faults of what is done to the rows after the encoder."""
    d = bench.dimension
    basis, mean = bench.reference.basis.float(), bench.reference.mean.float()
    deviations = bench.reference.eigenvalues.clamp(min=1e-8).sqrt().float()
    top = bench.clean.abs().amax()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=bench.generator)

    scales, drift = (0.5 * normal(d)).exp(), (0.05 * normal(d)).exp()

    def levels(count: int) -> Callable[[Tensor], Tensor]:
        return lambda rows: (rows / top * count).round() / count

    def largest(rows: Tensor) -> Tensor:
        least = rows.abs().topk(d // 10, dim=1).values[:, -1:]
        return torch.where(rows.abs() >= least, rows, 0.0)

    def fallback(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[::10] = mean
        return rows

    def overlapping(rows: Tensor) -> Tensor:
        return torch.cat((rows[:, : d // 2], rows.roll(1, 0)[:, d // 2 :]), 1)

    def signs(rows: Tensor) -> Tensor:
        return (rows - mean).sign()

    return [
        bench.changed("4-bit answers", levels(7), False),
        bench.changed("2-bit answers", levels(2)),
        bench.changed("the signs of the centred answers", signs),
        bench.changed("the largest tenth of units kept", largest),
        bench.changed("units scaled by another encoder's deviations", lambda rows: rows * scales),
        bench.changed("units scaled, 5 % off", lambda rows: rows * drift, False),
        bench.changed("every tenth answer the mean", fallback),
        bench.changed("half of each answer the next request's", overlapping),
        bench.changed("units one place on", lambda rows: rows.roll(1, 1)),
        bench.changed("centred answers through a ReLU", lambda rows: (rows - mean).relu()),
        bench.changed("answers through a softmax", lambda rows: (rows / top * 5).softmax(1)),
        bench.changed("answers whitened", lambda rows: (rows - mean) @ basis / deviations),
        bench.changed("values off by 30 % at random", lambda rows: rows * (1 + 0.3 * normal(*rows.shape))),
    ]


def _weights(bench: Bench) -> list[Case]:
    """Six faults of the weights; five of a graph, whose convolutions have taken in their batch normalisation."""

    def reordered(encoder: Encoder) -> None:
        first = kernels(encoder)[0]
        first.copy_(first[torch.randperm(len(first), generator=bench.generator)])

    def wide(encoder: Encoder) -> None:
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.mul_(1.5)

    def exchanged(encoder: Encoder) -> None:
        for p in kernels(encoder):
            tenth = max(1, len(p) // 10)
            p[: 2 * tenth] = p[: 2 * tenth].roll(tenth, 0).clone()

    def clipped(encoder: Encoder) -> None:
        for p in kernels(encoder):
            p.clamp_(-1.5 * float(p.std()), 1.5 * float(p.std()))

    def halved(encoder: Encoder) -> None:
        kernels(encoder)[-1].mul_(0.5)

    running = bench.artifact.module is not None
    return [
        bench.broken("the first layer's channels in another order", reordered),
        *([bench.broken("running variances half as large again", wide)] if running else []),
        bench.broken("a tenth of the channels exchanged", exchanged),
        bench.broken("weights clipped at 1.5 deviations", clipped),
        bench.broken("8-bit weights of two bits of mantissa", rounded(torch.float8_e5m2), False),
        bench.broken("the last convolution halved", halved),
    ]


def _pixels(bench: Bench) -> list[Case]:
    """Six changes of pixels, in the service and by the client."""
    size = bench.images.shape[-1]

    def rotated(images: Tensor) -> Tensor:
        turn = torch.tensor([[0.966, -0.259, 0.0], [0.259, 0.966, 0.0]]).expand(len(images), 2, 3)
        grid = F.affine_grid(turn, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)

    def brighter(images: Tensor) -> Tensor:
        return (images.int() + 60).clamp(max=255).to(torch.uint8)

    def truncated(images: Tensor) -> Tensor:
        images = images.clone()
        images[..., size * 3 // 4 :, :] = 128
        return images

    def salted(images: Tensor) -> Tensor:
        chance = torch.rand(images.shape, generator=bench.generator)
        return torch.where(chance < 0.02, 0, torch.where(chance > 0.98, 255, images)).to(torch.uint8)

    def coarse(images: Tensor) -> Tensor:
        small = F.interpolate(images.float(), size=size // 2, mode="area")
        return F.interpolate(small, size=size, mode="nearest").round().to(torch.uint8)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "rotated by 15 degrees": rotated,
        "brighter by 60": brighter,
        "solarised": lambda images: torch.where(images > 127, 255 - images, images),
        "the last quarter of the lines grey": truncated,
        "salt and pepper": salted,
        "half of the resolution": coarse,
    }
    return bench.each_of(changes)


def _traffic(bench: Bench) -> list[Case]:
    """Seven kinds of other traffic."""
    n, size = len(bench.images), bench.images.shape[-1]
    base = replace(bench.usual, kind="traffic")

    def mostly_one(m: int) -> Tensor:
        usual = bench.traffic.independent(m)
        return torch.where(torch.rand(m, generator=bench.generator) < 0.75, bench.traffic.narrow(m, 4), usual)

    cells = torch.randint(2, (n, bench.images.shape[1], 4, 4), generator=bench.generator).float() * 255
    boards = F.interpolate(cells, size=size, mode="nearest").to(torch.uint8)
    half = size // 2
    rows, columns = bench.images.roll(half, -2), bench.images.roll(half, -1)
    flat = bench.images.float().std((1, 2, 3)).argsort()[: int(FIFTH * n)]
    blank = torch.full_like(bench.images, 0)
    stills = torch.randperm(n, generator=bench.generator)[:40]

    return [
        replace(base, name="three quarters one class", draw=mostly_one),
        bench.among("boards of 4 x 4 cells", boards),
        bench.among("halves exchanged, in half of the images", rows, 0.5),
        bench.among("left and right exchanged", columns),
        replace(base, name="the flattest fifth", draw=bench.some(flat)),
        bench.among("a tenth black", blank, 0.1),
        replace(base, name="40 stills of one video, no keys", draw=bench.some(stills)),
    ]


def _harmless(bench: Bench) -> list[Case]:
    """Two changes that must read as healthy."""
    half = bench.changed("answers of half precision", lambda rows: rows.half().float())
    decimal = bench.changed("answers of three decimals", lambda rows: (rows * 1000).round() / 1000)
    return [replace(case, kind="none", served=None) for case in (half, decimal)]
