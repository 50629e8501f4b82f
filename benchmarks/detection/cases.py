"""Faults injected into a real encoder, other traffic, and traffic that is none of our business."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.detection.imported import GraphWeights
from fullrank import Reference
from fullrank.calibration.resample import Traffic
from fullrank.descriptors import describe
from models.artifact import Artifact
from models.backbones import Encoder
from models.embedder import Embedder
from models.embedder import normalize as unit

MODEL = ("model_fault", "complete_collapse", "dimensional_collapse")
TRAFFIC = ("traffic_narrowed", "traffic_shifted")
Change = Callable[[Tensor], Tensor]
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class Case:
    """What goes wrong: `kind` is model, traffic or none; rows are pool[draw(n)], their descriptors inputs[draw(n)].

    strong: an effect that must be found; canary: the canary's embeddings now; keyed: indices whose repetitions carry
    one content key each, as the service sends it; served: what a broken model makes of images; rate: rows a second.
    """

    name: str
    kind: str
    pool: Tensor
    inputs: Tensor
    canary: Tensor
    draw: Draw | None = None
    strong: bool = True
    keyed: frozenset[int] = frozenset()
    served: Change | None = None
    rate: float = 20.0


class Bench:
    """The encoder, its embeddings and descriptors of images that neither it nor its reference has seen, and ways to
    change both."""

    def __init__(self, artifact: Artifact, images: Tensor, labels: Tensor) -> None:
        assert artifact.reference is not None
        assert artifact.canary is not None
        self.artifact, self.images = artifact, images
        self.reference: Reference = artifact.reference
        self.canary_images = artifact.canary.images
        self.generator = torch.Generator().manual_seed(0)
        self.embedder = Embedder(artifact)
        self.clean, self.canary = self.embed(images), self.embed(self.canary_images)
        self.inputs = torch.from_numpy(describe(images.numpy()))
        self.dimension = self.clean.shape[1]
        self.traffic = Traffic(labels)
        self.usual = Case("healthy", "none", self.clean, self.inputs, self.canary)

    def embed(self, images: Tensor, embedder: Embedder | None = None) -> Tensor:
        """(n, d) unit rows."""
        return unit((embedder or self.embedder).embed(images))

    def changed(self, name: str, change: Change, strong: bool = True) -> Case:
        """A fault in the representation itself, in the canary's too."""
        rows, canary = unit(change(self.clean)), unit(change(self.canary))

        def served(images: Tensor) -> Tensor:
            return unit(change(self.embed(images)))

        return Case(name, "model", rows, self.inputs, canary, strong=strong, served=served)

    def forwarded(self, name: str, embedder: Embedder, strong: bool = True) -> Case:
        """Another model, for the canary too."""
        rows, canary = (self.embed(images, embedder) for images in (self.images, self.canary_images))

        def served(images: Tensor) -> Tensor:
            return self.embed(images, embedder)

        return Case(name, "model", rows, self.inputs, canary, strong=strong, served=served)

    def pixels(self, name: str, change: Change) -> tuple[Case, Case]:
        """Pixels changed within the service, after they are described: the model's fault, the canary's too. And by the
        client: other traffic, in the descriptors and not in the canary."""
        images = change(self.images)
        rows, canary = self.embed(images), self.embed(change(self.canary_images))
        seen = torch.from_numpy(describe(images.numpy()))

        def served(images: Tensor) -> Tensor:
            return self.embed(change(images))

        return (
            Case(f"{name}, in the service", "model", rows, self.inputs, canary, served=served),
            Case(f"{name}, by the client", "traffic", rows, seen, self.canary),
        )

    def each_of(self, changes: Mapping[str, Change]) -> list[Case]:
        """`pixels` of each change, by its name."""
        return [case for name, change in changes.items() for case in self.pixels(name, change)]

    def broken(self, name: str, change: Callable[[Encoder], None], strong: bool = True) -> Case:
        """The model with something done to its weights, for the canary too."""
        return self.forwarded(name, damaged(self.artifact, change), strong)

    def among(self, name: str, images: Tensor, share: float = 1.0) -> Case:
        """Traffic of which this share are other images, (n, c, s, s) uint8, one for each of the usual ones."""
        rows, seen = self.embed(images), torch.from_numpy(describe(images.numpy()))

        def draw(m: int) -> Tensor:
            index = self.traffic.independent(m)
            return torch.where(torch.rand(m, generator=self.generator) < share, index, index + len(images))

        pool, inputs = torch.cat((rows, self.clean)), torch.cat((seen, self.inputs))
        return replace(self.usual, name=name, kind="traffic", pool=pool, inputs=inputs, draw=draw, strong=share > 0.1)

    def some(self, rows: Tensor) -> Draw:
        """These rows alone, drawn alike and independently."""
        return lambda m: rows[torch.randint(len(rows), (m,), generator=self.generator)]

    def damage(self, share: float) -> Callable[[Encoder], None]:
        """A share of all convolution weights set to zero."""

        def change(encoder: Encoder) -> None:
            for parameter in kernels(encoder):
                parameter[torch.rand(parameter.shape, generator=self.generator) < share] = 0

        return change

    def model_faults(self, collapsed: Artifact) -> list[Case]:
        """What breaks a model, at several strengths."""
        d = self.dimension
        basis, mean = self.reference.basis.float(), self.reference.mean.float()
        turned = torch.linalg.qr(torch.randn(d, d, generator=self.generator)).Q
        order = torch.randperm(d, generator=self.generator)

        def project(frame: Tensor) -> Change:
            return lambda rows: rows @ frame @ frame.T

        def dead(share: float) -> Change:
            alive = torch.ones(d)
            alive[order[: int(share * d)]] = 0
            return lambda rows: rows * alive

        def shrunk(factor: float) -> Change:
            return lambda rows: mean + (rows - mean) / factor

        def shifted(by: float) -> Change:
            return lambda rows: rows + by * basis[:, 0]

        forgotten = copy.deepcopy(self.artifact)
        preprocessing = forgotten.card.preprocessing
        plain = preprocessing.model_copy(
            update={"mean": tuple(0.0 for _ in preprocessing.mean), "std": tuple(1.0 for _ in preprocessing.std)}
        )
        forgotten = replace(forgotten, card=forgotten.card.model_copy(update={"preprocessing": plain}))
        return [
            *(self.changed(f"principal rank {d // k}", project(basis[:, : d // k])) for k in (2, 4, 8)),
            *(self.changed(f"random rank {d // k}", project(turned[:, : d // k])) for k in (2, 4, 8)),
            *(self.changed(f"{share:.0%} of units dead", dead(share), share > 0.1) for share in (0.05, 0.1, 0.3, 0.5)),
            *(self.changed(f"spread shrunk to 1/{f}", shrunk(f), f > 2) for f in (2, 5, 20)),
            *(self.changed(f"mean shifted by {by}", shifted(by), by > 0.5) for by in (0.5, 1, 2)),
            *(
                self.broken(f"{share:.0%} of weights zeroed", self.damage(share), share > 0.03)
                for share in (0.03, 0.1, 0.4)
            ),
            self.forwarded("normalisation forgotten", Embedder(forgotten)),
            *(self.broken(f"{bits}-bit weights", quantised(bits), bits < 4) for bits in (3, 4)),
            self.forwarded("collapsed encoder", Embedder(collapsed)),
        ]

    def traffic_faults(self) -> list[Case]:
        """Other images, the model intact."""
        # Smooth random fields: images, but not of clothes.
        noise = torch.rand(len(self.images), self.images.shape[1], 5, 5, generator=self.generator)
        fields = torch.nn.functional.interpolate(noise, self.images.shape[-2:], mode="bicubic").clamp(0, 1)
        fields = (fields * 255).to(torch.uint8)
        foreign, seen = self.embed(fields), torch.from_numpy(describe(fields.numpy()))
        base = replace(self.usual, kind="traffic")
        both = replace(base, pool=torch.cat((foreign, self.clean)), inputs=torch.cat((seen, self.inputs)))
        n = len(self.clean)

        def mixed(share: float) -> Draw:
            def draw(m: int) -> Tensor:
                rows = self.traffic.independent(m)
                return torch.where(torch.rand(m, generator=self.generator) < share, rows, rows + n)

            return draw

        def hot(m: int) -> Tensor:
            rows = self.traffic.independent(m)
            rows[torch.rand(m, generator=self.generator) < 0.1] = 0
            return rows

        few = torch.randperm(n, generator=self.generator)[:200]
        copies = few.repeat(30)
        jitter = 0.005 / math.sqrt(self.dimension) * torch.randn(len(copies), self.dimension, generator=self.generator)
        near = replace(base, pool=self.clean[copies] + jitter, inputs=self.inputs[copies], strong=False)

        def only(c: int) -> Draw:
            return lambda m: self.traffic.narrow(m, c)

        return [
            *(replace(base, name=f"class {c} only", draw=only(c)) for c in range(len(self.traffic.classes))),
            replace(base, name="foreign images", pool=foreign, inputs=seen),
            replace(both, name="half foreign", draw=mixed(0.5)),
            replace(both, name="10 % foreign", draw=mixed(0.1), strong=False),
            replace(base, name="10 % one hot image, no keys", draw=hot, strong=False),
            replace(base, name="10 % one hot image", draw=hot, strong=False, keyed=frozenset((0,))),
            replace(base, name="200 images, repeated, no keys", draw=self.some(few), strong=False),
            replace(near, name="200 images, near-duplicates", draw=self.some(torch.arange(len(copies)))),
        ]

    def cases(self, collapsed: Artifact) -> list[Case]:
        """Every fault and every harmless change."""
        harmless = [
            self.usual,
            self.forwarded("bfloat16", Embedder(self.artifact, dtype=torch.bfloat16)),
            self.broken("8-bit weights", quantised(8)),
        ]
        inverted = self.pixels("pixels inverted", lambda images: 255 - images)
        tenth = self.pixels("pixels a tenth", lambda images: images // 10)
        model = [*self.model_faults(collapsed), inverted[0], tenth[0]]
        traffic = [*self.traffic_faults(), inverted[1], tenth[1]]
        return [*model, *traffic, *(replace(case, kind="none") for case in harmless)]


class RowsBench(Bench):
    """The same for rows (n, d) that were embedded elsewhere, of which only the rows can be changed.

    Of the rows, the first `reference_rows` make the reference, 256 of them its canary, and the others are the traffic.
    """

    def __init__(self, file: Path, reference_rows: int | None = None) -> None:
        with np.load(file) as arrays:
            rows, labels, inputs = (torch.from_numpy(arrays[key]) for key in ("rows", "labels", "inputs"))
        n = reference_rows or len(rows) // 2
        self.canary = unit(rows[:256].float())
        self.reference = Reference.build(rows[:n], labels=labels[:n], inputs=inputs[:n], canary=self.canary)
        self.clean, self.inputs = unit(rows[-(len(rows) // 2) :].float()), inputs[-(len(rows) // 2) :]
        self.generator = torch.Generator().manual_seed(0)
        self.dimension = self.clean.shape[1]
        self.traffic = Traffic(labels[-(len(rows) // 2) :])
        self.usual = Case("healthy", "none", self.clean, self.inputs, self.canary)


def kernels(module: nn.Module) -> list[nn.Parameter]:
    """The weights of its convolutions."""
    return [p for p in module.parameters() if p.ndim == 4]


def damaged(artifact: Artifact, change: Callable[[Encoder], None]) -> Embedder:
    """The encoder with changed weights."""
    broken = copy.deepcopy(artifact)
    if broken.module is None and broken.graph is not None:
        weights = GraphWeights(broken.graph)
        change(weights)
        return Embedder(replace(broken, graph=weights.of(broken.graph)))
    with torch.no_grad():
        change(broken.encoder)
    return Embedder(broken)


def rounded(dtype: torch.dtype) -> Callable[[Encoder], None]:
    """Convolution weights rounded to a floating-point type."""

    def change(encoder: Encoder) -> None:
        for p in kernels(encoder):
            p.copy_(p.to(dtype).to(p.dtype))

    return change


def noisy(share: float, generator: torch.Generator) -> Callable[[Encoder], None]:
    """Convolution weights and noise of this share of each one's deviation."""

    def change(encoder: Encoder) -> None:
        for p in kernels(encoder):
            p.add_(share * p.std() * torch.randn(p.shape, generator=generator))

    return change


def quantised(bits: int) -> Callable[[Encoder], None]:
    """Convolution weights rounded to a symmetric grid per output channel."""

    def change(encoder: Encoder) -> None:
        for p in kernels(encoder):
            step = p.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            p.copy_((p / step).round() * step)

    return change
