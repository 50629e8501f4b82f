"""The Recipe dataclass: all settings of a training run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from models.artifact import AnyArchitecture
from training.augment import Augmentation
from training.plugins import OwnArchitecture


@dataclass(frozen=True)
class Recipe:
    """All settings that determine a run. `options` go to the method's constructor."""

    name: str
    data: str
    method: str
    architecture: AnyArchitecture | OwnArchitecture
    augmentation: Augmentation
    second: Augmentation | None = None
    """The other view's augmentation, where it differs from the first's (BYOL's t')."""
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 128
    """Over all processes."""
    accumulate: int = 1
    """Parts that a process's share of a batch is cut into, to save memory: each is a batch of its own to BatchNorm and
    to losses that compare images."""
    image_size: int | None = None
    """Side of the encoder's input in pixels; None: the data set's."""
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    learning_rate: float = 0.2
    """The peak, for this batch size."""
    bias_lr_scale: float = 1.0
    """Learning rate of biases and BatchNorm over that of weights."""
    weight_decay: float = 1e-4
    trust: float = 1e-3
    """LARS' coefficient, eta."""
    trust_clip: bool = False
    """Let LARS only lower a weight's rate, never raise it above the run's."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters together."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly."""
    final_lr: float = 0.0
    """Where the cosine ends, over the peak."""
    held_out: int = 10_000
    """Training images kept from the gradient: they choose, and they carry the reference's held-out split."""
    seed: int = 0


RecipeFunction = Callable[[], Recipe]


def of_the_sum(weight_decay: float) -> dict[str, Any]:
    """LARS' settings for a loss that was published as the sum of the two directions, and here is their mean.

    LARS' step on a matrix does not feel the factor if the weight decay is halved with the loss. Biases and BatchNorm
    get no adapted rate, so that theirs is doubled. SimCLR's release, BYOL's and solo-learn's BYOL sum. One difference
    stays: where `trust_clip` holds a matrix at the run's own rate, its step is half of theirs.
    """
    return {"weight_decay": weight_decay / 2, "bias_lr_scale": 2.0}
