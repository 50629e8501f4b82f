"""Shared parts of the importers: checkpoints, families, questions that the weights leave open, and refusals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from models.preprocess import Preprocessing

Tensors = dict[str, Tensor]
T = TypeVar("T", int, float, str, bool)
Weights = Literal["online", "ema"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
# Key parts that wrappers add: DataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
SHOWN = 5
WHOLE = (
    "holds a pickled module, whose tensors only its own code can name: where that code is installed, load the file, if "
    "you trust it, and save module.state_dict()"
)


class ImportRefusedError(ValueError):
    """Raised for a source that cannot be imported. The message says what is wrong with it and what to do."""


@dataclass
class Questions:
    """Questions that the weights do not answer. Each has a default of the family; `--set KEY=VALUE` overrides it."""

    settings: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None
    pool: str | None = None
    assumed: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def ask(self, key: str, default: T, choices: tuple[T, ...] = ()) -> T:
        """The user's answer, or the default, which is noted. Raises ImportRefusedError for an invalid answer."""
        self.asked.add(key)
        if key not in self.settings:
            self.assumed[key] = str(default)
            return default
        text = self.settings[key]
        try:
            answer = text.lower() in ("1", "true", "yes") if isinstance(default, bool) else type(default)(text)
        except ValueError:
            raise ImportRefusedError(f"--set {key}={text}: give a number, such as {default}") from None
        if choices and answer not in choices:
            raise ImportRefusedError(f"--set {key}={text}: choose one of {', '.join(map(str, choices))}")
        return answer

    def which(self, available: tuple[Weights, ...], default: Weights) -> Weights:
        """Choose a checkpoint's weights: the trained ones, or their moving average (teacher, target, momentum)."""
        if self.weights is not None and self.weights not in available:
            raise ImportRefusedError(
                f"--weights {self.weights}: this checkpoint has only {', '.join(available)} weights"
            )
        if self.weights is None and len(available) > 1:
            self.assumed["weights"] = f"{default} (there are {' and '.join(available)}; --weights chooses)"
        return self.weights or default


@dataclass
class Found:
    """A family's reading of a checkpoint: tensors under our names, the tensors left out, and facts about the model.

    facts: arguments of the architecture that the weights do not show, from the family or from a config.
    resample: arguments of `models.backbones.vit.resampled`, the family's rule for other image sizes.
    """

    kind: Literal["resnet", "vit"]
    tensors: Tensors
    dropped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    origin: str = ""
    resample: dict[str, Any] = field(default_factory=dict)
    weights: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: nested containers of tensors, the JSON records beside the file, and its path."""

    content: Any
    path: Path
    sha256: str
    records: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""
    left_out: tuple[str, ...] = ()  # names of the types that --strip replaced by stubs

    def tensors(self, *keys: str) -> Tensors:
        """The tensors of the container at `keys`, without the name parts that wrappers add; empty if there is none."""
        here = self.content
        for key in keys:
            here = here.get(key) if isinstance(here, Mapping) else None
        if not isinstance(here, Mapping):
            return {}
        return {cleaned(str(name)): value for name, value in here.items() if isinstance(value, Tensor)}

    def state(self, ema: bool = False) -> Tensors:
        """The tensors at the places that trainers usually use: the top, or below state_dict, model and the like."""
        for key in (
            *(("state_dict_ema", "model_ema", "ema") if ema else ()),
            "state_dict",
            "model",
            "teacher",
            "module",
        ):
            if found := self.tensors(key):
                return found
        return self.tensors()


@dataclass(frozen=True)
class Family:
    """A source of weights: how to recognise its checkpoints, and how to read them."""

    name: str
    source: str
    claims: Callable[[Checkpoint], bool]
    translate: Callable[[Checkpoint, Questions], Found]


def refuse_endless(path: Path) -> None:
    """Raise ImportRefusedError for a pipe or a device: what is there, and is no file, might never end."""
    if path.exists() and not path.is_file():
        raise ImportRefusedError(f"{path} is no regular file, and might never end; copy its content to a file")


def cleaned(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def take(tensors: Tensors, prefix: str, reasons: Mapping[str, str] | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors below `prefix`, without the prefix in their names; and the other tensors with a reason for each.

    A tensor below the prefix is also left out if its name (without the prefix) starts with a key of `reasons`.
    """
    reasons = reasons or {}
    kept: Tensors = {}
    dropped: dict[str, str] = {}
    for name, tensor in tensors.items():
        inside = name.startswith(prefix)
        short = name[len(prefix) :] if inside else name
        reason = next((why for part, why in reasons.items() if short.startswith(part)), None)
        if reason is None and inside:
            kept[short] = tensor
        else:
            dropped[name] = reason or f"not below {prefix}*"
    if not kept:
        some = ", ".join(list(tensors)[:SHOWN]) or "none"
        raise ImportRefusedError(f"there are no tensors below {prefix or 'the top'}*; the first are {some}")
    return kept, dropped


def imagenet(to: int = 256, size: int = 224, interpolation: str = "bilinear", **other: Any) -> Preprocessing:
    """ImageNet's preprocessing: short side to `to`, centre crop of `size`, its mean and std, JPEGs decoded in full."""
    values = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "resize": "short", "draft": 0} | other
    return Preprocessing.model_validate({"size": size, "to": to, "interpolation": interpolation} | values)


def small(mean: tuple[float, ...], std: tuple[float, ...], size: int = 32) -> Preprocessing:
    """Preprocessing for images of CIFAR's size: short side and centre crop both of `size`."""
    return imagenet(size, size, mean=mean, std=std)
