"""What share of the traffic an ordinary client needs to mute a page or to cause one, by a seeded simulation.

    python -m benchmarks.adversary --write docs/measured/adversary.md

A simulated encoder of 64 dimensions maps ten classes of latent images; descriptors of inputs are 12 of their
coordinates. Its reference is calibrated and knows inputs and canary. A client sends a share of the 3,000 rows of a
window, the others are healthy traffic; the model is healthy or broken. An attack succeeds at the least share on the
grid at which the verdict no longer pages, or pages. A client in front of the service chooses images, never embeddings:
what it sends goes through the model, broken or not.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._page import write_between
from fullrank import Reference, SpectrumMonitor
from fullrank.calibration.resample import calibrated

DIMENSION, INPUTS, CLASSES, ROWS = 64, 12, 10, 3000
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
PAGES = ("model_fault", "complete_collapse", "dimensional_collapse")
Model = Callable[[Tensor], Tensor]
Images = Callable[["World", int], Tensor]


class World:
    """Latent images, their descriptors, and an encoder."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.basis = torch.linalg.qr(self.normal(DIMENSION, DIMENSION)).Q
        self.centres = torch.zeros(CLASSES, DIMENSION)
        self.centres[:, : CLASSES - 1] = 1.5 * self.normal(CLASSES, CLASSES - 1)
        self.scale = torch.arange(1, DIMENSION + 1).float() ** -0.5
        first, second = self.images(8000), self.images(8000)
        self.canary = self.images(64)
        built = Reference.build(self.healthy(first), self.healthy(second), canary=self.healthy(self.canary))
        self.reference = calibrated(built, self.healthy(second), None, self.described(second))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(*shape, generator=self.generator)

    def images(self, n: int, classes: int = CLASSES) -> Tensor:
        """(n, d) latent images, drawn from the first so many classes."""
        labels = torch.randint(classes, (n,), generator=self.generator)
        return self.centres[labels] + self.normal(n, DIMENSION) * self.scale + 0.5

    def healthy(self, images: Tensor) -> Tensor:
        """What the intact model makes of images."""
        rows: Tensor = images @ self.basis
        return rows

    def described(self, images: Tensor) -> Tensor:
        """The inputs' descriptors."""
        return images[:, :INPUTS]

    def faults(self) -> dict[str, Model]:
        """Broken models."""
        frame = self.basis[:16].T  # rows of the basis are the directions of the embedding
        noise = torch.linalg.qr(self.normal(DIMENSION, DIMENSION)).Q
        return {
            "rank 16 of 64": lambda images: self.healthy(images) @ frame @ frame.T,
            "all at one point": lambda images: self.healthy(images) * 1e-3 + 1,
            "tail lifted": lambda images: self.healthy(images) + 0.6 * torch.tanh(4 * images @ noise),
        }

    def state(self, model: Model, images: Tensor, canary: bool) -> str:
        """The verdict's state on a window of these images, without keys."""
        order = torch.randperm(len(images), generator=self.generator)
        with SpectrumMonitor(DIMENSION, self.reference, (300.0,), clock=lambda: 0.0) as monitor:
            monitor.observe(model(images[order]), None, self.described(images[order]))
            if canary:
                monitor.record_canary(model(self.canary))
            monitor.flush()
            return monitor.snapshot().verdict.state


@dataclass(frozen=True)
class Attack:
    """What a client sends."""

    name: str
    images: Images


def _one(world: World, n: int) -> Tensor:
    return world.images(1).expand(n, -1)


def _near(world: World, n: int) -> Tensor:
    return world.images(1) + 0.02 * world.normal(n, DIMENSION)


def _few(world: World, n: int) -> Tensor:
    return world.images(30)[torch.randint(30, (n,), generator=world.generator)]


def _narrow(world: World, n: int) -> Tensor:
    return world.images(n, 1)


def _foreign(world: World, n: int) -> Tensor:
    return 8 * torch.eye(DIMENSION)[1] + 0.05 * world.normal(n, DIMENSION)


def _crafted(world: World, n: int) -> Tensor:
    """Images whose thumbnails are ordinary and whose embeddings are moved along trailing directions."""
    images = world.images(n)
    images[:, INPUTS:] += 3 * world.scale[INPUTS:]
    return images


ATTACKS = (
    Attack("one image, again and again", _one),
    Attack("near-copies of one image", _near),
    Attack("30 images, again and again", _few),
    Attack("one class only", _narrow),
    Attack("foreign images", _foreign),
    Attack("crafted: ordinary thumbnails, moved embeddings", _crafted),
)


def least_share(world: World, model: Model, attack: Attack, pages: bool, canary: bool) -> float | None:
    """The least share of the grid at which the verdict pages, or no longer does; None where none does."""
    for share in SHARES:
        sent = round(share * ROWS)
        images = torch.cat((world.images(ROWS - sent), attack.images(world, sent)))
        if (world.state(model, images, canary) in PAGES) is pages:
            return share
    return None


def tables(world: World) -> Iterator[str]:
    """Two Markdown tables: muting a page of each fault, and causing one with a healthy model."""
    faults = world.faults()
    yield "**To mute a page**, share of all rows, canary off\n"
    yield "| a client sends | " + " | ".join(faults) + " |\n" + "|---" * (len(faults) + 1) + "|"
    for attack in ATTACKS:
        shares = [least_share(world, model, attack, pages=False, canary=False) for model in faults.values()]
        yield f"| {attack.name} | " + " | ".join(map(_said, shares)) + " |"
    yield "\n**To cause a page** while the model is healthy\n"
    yield "| a client sends | canary off | canary on |\n|---|---|---|"
    for attack in ATTACKS:
        off, on = (least_share(world, world.healthy, attack, pages=True, canary=canary) for canary in (False, True))
        yield f"| {attack.name} | {_said(off)} | {_said(on)} |"


def _said(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the tables between the marks in this file")
    options = parser.parse_args()
    world = World()
    for name, model in ({"healthy": world.healthy} | world.faults()).items():
        print(f"{name}: {world.state(model, world.images(ROWS), canary=False)}", flush=True)
    lines = []
    for line in tables(world):
        print(line, flush=True)
        lines.append(line)
    text = "\n".join(lines)
    if options.write:
        write_between(options.write, "<!-- adversary: start -->", "<!-- adversary: end -->", text)


if __name__ == "__main__":
    main()
