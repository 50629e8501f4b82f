"""The collapse guard: tests after each epoch whether the encoder still tells images apart, by checks of `models.gate`.

A run is compared with its untrained twin, the same architecture with random weights, never with its own past, because a
healthy run narrows: of the 55 directions that a random network uses, SimCLR uses 4 after its first epoch. So the guard
uses only those checks of the gate that tell a dead encoder from a narrow one. These are the spread of the
representation and of the projection, and the share of the representation's directions and coordinates that are alive.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank import measures
from fullrank.verdict import VARIANCE_SHARE
from models.artifact import Artifact
from models.embedder import Embedder
from models.gate import Check, Figures, varied
from models.preprocess import prepare_arrays
from training.methods import Method, build
from training.trainer import Trainer

GuardMode = Literal["warn", "stop", "off"]
IMAGES = 512
"""Held-out images that the guard looks at, and training images that BatchNorm's statistics are measured on."""
CRITERIA = {"representation": ("total_variance", "alive_fraction", "dead_fraction"), "projection": ("total_variance",)}
ONE_DIRECTION = 1.1
"""Participation ratio of the representation below which one direction holds all of the variance."""
SETTLED = 50
"""Steps after which BatchNorm's running statistics have forgotten their initial values (0.9^50 is 0.005). Before, what
is measured in evaluation mode may look like a collapse, and counts when the next epoch shows it again."""
AT_TRIVIAL = 0.005
"""Distance of the loss from its trivial value, as a share of that value or of 1, that counts as none."""


@dataclass(frozen=True)
class Geometry:
    """The figures of the guard's images, as representations and as projections."""

    representation: Figures
    projection: Figures

    @classmethod
    def of(cls, h: Tensor, z: Tensor) -> "Geometry":
        return cls(Figures.of(h), Figures.of(z))


@dataclass(frozen=True)
class Twin:
    """The untrained twin, with its initial BatchNorm statistics or with statistics measured on the data."""

    statistics: Literal["initial", "measured"]
    artifact: Artifact
    geometry: Geometry
    method: Method

    @torch.no_grad()
    def project(self, h: Tensor) -> Tensor:
        """Project representations (n, d) to the space of the loss, in evaluation mode: (n, k) on the CPU."""
        projected: Tensor = self.method.project(h.to(next(self.method.parameters()).device))
        return projected.float().cpu()


@torch.no_grad()
def twins(trainer: Trainer) -> list[Twin]:
    """Both untrained twins of a run. They have the random weights of its seed, also if the run began with --init."""
    torch.manual_seed(trainer.recipe.seed)
    method = build(trainer.recipe.method, trainer.recipe.architecture.build(), trainer.recipe.options)
    method = method.to(trainer.device)
    found = [_twin("initial", method, trainer)]
    measure_statistics(method, trainer)
    return [*found, _twin("measured", method, trainer)]


def _twin(statistics: Literal["initial", "measured"], method: Method, trainer: Trainer) -> Twin:
    method = copy.deepcopy(method).eval().requires_grad_(False)
    artifact = Artifact(trainer.artifact().card, method.encoder)
    h = Embedder(artifact, trainer.device).embed_arrays(trainer.split.held_out.images[:IMAGES])
    z = method.project(h.to(trainer.device)).float().cpu()
    return Twin(statistics, artifact, Geometry.of(h, z), method)


def measure_statistics(method: Method, trainer: Trainer) -> None:
    """Set every BatchNorm's statistics to those of one batch of training images."""
    pixels = prepare_arrays(trainer.split.labelled.images[:IMAGES], trainer.preprocessing)
    images = (torch.from_numpy(pixels).to(trainer.device).float() / 255 - trainer.mean) / trainer.std
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    method.train()
    method.project(method.encoder(images))
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


class Guard:
    """The guard. Called once an epoch, it says in words that the encoder has collapsed, or returns None."""

    def __init__(self, twins: Sequence[Geometry], trivial_loss: float | None, share: float = VARIANCE_SHARE) -> None:
        """`share`: the least spread allowed, as a share of the lesser twin's. Raises ValueError outside of (0, 1)."""
        if not 0 < share < 1:
            raise ValueError(f"guard_share is {share}; it must lie between 0 and 1")
        self.twins = twins
        self.trivial = trivial_loss
        self.share = share
        self.faulty_before = self.trivial_before = False

    def __call__(self, record: Mapping[str, Any], geometry: Geometry) -> str | None:
        """`record` has the epoch, the step and the mean loss."""
        epoch = int(record["epoch"])
        loss = float(record["loss"])
        faults = [f"the {space}'s {check}" for space in CRITERIA for check in self._failed(space, geometry)]
        if geometry.representation.participation_ratio < ONE_DIRECTION:
            faults.append("one direction holds all of the representation's variance")
        sure = int(record["step"]) >= SETTLED or self.faulty_before or is_a_point(geometry.representation)
        told = faults if sure else []
        trivial = self.at_trivial(loss)
        if trivial and (told or self.trivial_before):
            told = [*told, f"the loss, {loss:.4g}, is what an encoder gets that gives every image the same row"]
        self.faulty_before = bool(faults)
        self.trivial_before = trivial
        return f"collapse in epoch {epoch}: {'; '.join(told)}" if told else None

    def recall(self, record: Mapping[str, Any]) -> None:
        """Remember the last epoch of a run that goes on, from its record."""
        self.faulty_before = bool(record.get("guard"))
        self.trivial_before = self.at_trivial(float(record["loss"]))

    def at_trivial(self, loss: float) -> bool:
        """Whether the loss is that of an encoder that gives every image the same row."""
        return self.trivial is not None and abs(loss - self.trivial) <= AT_TRIVIAL * max(1.0, abs(self.trivial))

    def _failed(self, space: str, geometry: Geometry) -> list[Check]:
        """The gate's checks that fail against both twins, with the limits of the more lenient one."""
        figures = getattr(geometry, space)
        theirs = [getattr(twin, space) for twin in self.twins]
        # A twin that cannot tell the images apart either, such as of black ones, leaves the absolute floors.
        known = [twin for twin in theirs if not is_a_point(twin)] or [None]
        verdicts = [{check.name: check for check in varied(figures, it, share=self.share)} for it in known]
        names = [name for name in CRITERIA[space] if not any(checks[name].passed for checks in verdicts)]
        return [min((checks[name] for checks in verdicts), key=lambda check: check.limit) for name in names]


def is_a_point(figures: Figures) -> bool:
    """Whether all rows are equal up to rounding. Nothing can be calibrated on them."""
    return not figures.total_variance > figures.dimension * measures.noise_floor(torch.float32, figures.dimension)


def in_words(figures: Figures) -> str:
    return (
        f"collapsed: total variance {figures.total_variance:.3g} on held-out images, participation ratio"
        f" {figures.participation_ratio:.3g} of {figures.dimension}"
    )


def log_entry(twins: Sequence[Twin]) -> dict[str, Any]:
    """The entry on the untrained twins in a run's first record."""
    return {
        twin.statistics: {
            space: {
                "total_variance": round(figures.total_variance, 5),
                "participation_ratio": round(figures.participation_ratio, 2),
            }
            for space, figures in vars(twin.geometry).items()
        }
        for twin in twins
    }
