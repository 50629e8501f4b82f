"""What share of the traffic an ordinary client needs to mute a page or to cause one, by a seeded simulation.

    python -m benchmarks.adversary --write docs/measured/adversary.md
    python -m benchmarks.adversary --medians --write docs/measured/adversary.md

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
from fullrank import Reference, SpectrumMonitor, profile
from fullrank.calibration.resample import calibrated
from fullrank.rows import unit
from fullrank.thresholds import thresholds

DIMENSION, INPUTS, CLASSES, ROWS, GROUPS = 64, 12, 10, 3000, 10
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


def read(world: World, rows: Tensor) -> list[tuple[float, float]]:
    """The strongest trailing band and the tail's shift of a window (n, d) of ten groups in order of time.

    By averages over the groups, as the monitor reads them, and by medians."""
    it = world.reference
    groups = torch.split(unit(rows).double(), len(rows) // GROUPS)
    means = torch.stack([group.mean(0) for group in groups]) @ it.basis
    energies = torch.stack(
        [profile.band_sums(profile.energies_of_rows(profile.centred(g), it.basis) / len(g), it.bands) for g in groups]
    )
    head, found = profile.head_bands(len(it.bands)), []
    for mean, energy in ((means.mean(0), energies.mean(0)), (means.median(0).values, energies.median(0).values)):
        along = mean - it.mean @ it.basis
        shift = profile.tail_shift(along, it.bands, it.band_energy, energy, len(rows), it.rows)
        found.append((float((energy / it.band_energy)[head:].max()), shift))
    return found


def medians(world: World) -> Iterator[str]:
    """A table: what averages and medians over ten groups read, of attacks spread evenly and in one burst, and of faults
    that began in the last two fifths of the window."""
    windows = {"healthy": world.healthy(world.images(ROWS))}
    for name, share in (("near-copies of one image", 0.1), ("foreign images", 0.05), (ATTACKS[-1].name, 0.2)):
        attack = next(it for it in ATTACKS if it.name == name)
        sent = round(share * ROWS)
        images = torch.cat((world.images(ROWS - sent), attack.images(world, sent)))
        order = torch.randperm(ROWS, generator=world.generator)
        windows[f"{name}, {share:.0%}, spread evenly"] = world.healthy(images[order])
        windows[f"{name}, {share:.0%}, in one burst"] = world.healthy(images)
    late = 2 * ROWS // 5
    for name, model in world.faults().items():
        windows[f"fault: {name}, since two minutes"] = torch.cat(
            (world.healthy(world.images(ROWS - late)), model(world.images(late)))
        )
    limit = thresholds(world.reference, ROWS)
    yield "| window | strongest trailing band: average | median | shift in the tail: average | median |"
    yield "|---" * 5 + "|"
    for name, rows in windows.items():
        (band, shift), (middle_band, middle_shift) = read(world, rows)
        yield f"| {name} | {band:.2f} | {middle_band:.2f} | {shift:.4f} | {middle_shift:.4f} |"
    high, moved = limit["tail_energy_ratio_high"], limit["tail_shift"]
    yield f"| *abnormal above* | {high:.2f} | {high:.2f} | {moved:.4f} | {moved:.4f} |"


def _said(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the tables between the marks in this file")
    parser.add_argument("--medians", action="store_true", help="what medians over blocks would read instead")
    options = parser.parse_args()
    world = World()
    mark = "medians" if options.medians else "adversary"
    if not options.medians:
        for name, model in ({"healthy": world.healthy} | world.faults()).items():
            print(f"{name}: {world.state(model, world.images(ROWS), canary=False)}", flush=True)
    lines = []
    for line in medians(world) if options.medians else tables(world):
        print(line, flush=True)
        lines.append(line)
    text = "\n".join(lines)
    if options.write:
        write_between(options.write, f"<!-- {mark}: start -->", f"<!-- {mark}: end -->", text)


if __name__ == "__main__":
    main()
