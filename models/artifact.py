"""The encoder artifact: a folder that says everything serving needs, and is refused when any of it disagrees.

    encoder.json            the card: name, architecture, preprocessing, training, measured quality, hashes of the rest
    encoder.safetensors     the weights, float32, under torchvision's names
    reference.safetensors   healthy statistics and the canary images (optional: an imported encoder has none yet)

No file can run code: JSON is validated by pydantic, tensors are safetensors.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fullrank.reference import Reference
from models.backbones.resnet import Name, ResNet, Stem
from models.preprocess import Preprocessing, Strict

CARD, WEIGHTS, REFERENCE = "encoder.json", "encoder.safetensors", "reference.safetensors"
CANARY_IMAGES = "canary.images"
MEASURED_ON = "encoder.sha256"  # of the weights that the reference was measured on


class ArtifactError(ValueError):
    """An artifact that cannot be trusted; the message names the file and what disagrees."""


class Architecture(Strict):
    name: Name
    width: int = Field(default=64, ge=1, le=1024)
    in_channels: Literal[1, 3] = 3
    stem: Stem = "7x7"

    def build(self) -> ResNet:
        return ResNet(self.name, width=self.width, in_channels=self.in_channels, stem=self.stem)


class EncoderCard(Strict):
    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    architecture: Architecture
    preprocessing: Preprocessing
    dimension: int = Field(ge=1)
    training: dict[str, Any] = Field(default_factory=dict, description="method, data, recipe, epochs, seed, command")
    quality: dict[str, Any] = Field(default_factory=dict, description="what was measured, and on what")
    canary_licence: str = Field(default="", description="licence of the canary images")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of every other file of the folder")

    @property
    def revision(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of encoder.safetensors."""
        return self.files[WEIGHTS][:12]

    @model_validator(mode="after")
    def _channels_agree(self) -> "EncoderCard":
        if self.architecture.in_channels != self.preprocessing.channels:
            raise ValueError("architecture.in_channels and preprocessing.channels differ")
        return self


@dataclass(frozen=True)
class Canary:
    """Fixed images and what the encoder made of them: images (m, channels, size, size) uint8, embeddings (m, d)."""

    images: Tensor
    embeddings: Tensor
    licence: str


@dataclass(frozen=True)
class Artifact:
    card: EncoderCard
    encoder: ResNet
    reference: Reference | None = None
    canary: Canary | None = None


def save(artifact: Artifact, folder: str | os.PathLike[str]) -> Artifact:
    """Write `artifact` to `folder` and return it with its file hashes (hence its revision) filled in.

    The folder appears whole or not at all: everything is written beside it first, then renamed into place.
    An existing artifact there is replaced; anything else there raises ArtifactError.
    """
    target = Path(folder)
    if target.exists() and not (target / CARD).is_file():
        raise ArtifactError(f"{target} exists and is not an encoder artifact; choose another folder")
    contents = {WEIGHTS: save_tensors({k: v.contiguous() for k, v in artifact.encoder.state_dict().items()})}
    if artifact.reference is not None:
        tensors = {name: tensor.contiguous() for name, tensor in artifact.reference.tensors().items()}
        if artifact.canary is not None:
            tensors[CANARY_IMAGES] = artifact.canary.images.contiguous()
        tensors[MEASURED_ON] = torch.tensor(list(hashlib.sha256(contents[WEIGHTS]).digest()), dtype=torch.uint8)
        contents[REFERENCE] = save_tensors(tensors)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    licence = artifact.canary.licence if artifact.canary else ""
    card = artifact.card.model_copy(update={"files": hashes, "canary_licence": licence})

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        for name, data in contents.items():
            (fresh / name).write_bytes(data)
        (fresh / CARD).write_text(card.model_dump_json(indent=2) + "\n")
        if target.exists():
            target.rename(Path(scratch, "old"))
        fresh.rename(target)
    return Artifact(card, artifact.encoder, artifact.reference, artifact.canary)


def load(folder: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact. The encoder comes back in eval mode, float32, on the CPU.

    Raises ArtifactError, naming the file and the reason, when a file is missing, was changed since it was written,
    lacks a parameter, has one of another shape, or contradicts the card.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a folder; an encoder is a folder holding {CARD} and {WEIGHTS}")
    card = _read_card(root)
    if WEIGHTS not in card.files:
        raise ArtifactError(f"{root / CARD} lists no hash for {WEIGHTS}")
    encoder = _read_encoder(root, card)
    if REFERENCE not in card.files:
        return Artifact(card, encoder)
    tensors = _read_tensors(root, REFERENCE, card.files[REFERENCE])
    images, measured_on = tensors.pop(CANARY_IMAGES, None), tensors.pop(MEASURED_ON, None)
    if measured_on is not None and bytes(measured_on.tolist()).hex() != card.files[WEIGHTS]:
        _refuse(
            root / REFERENCE, "it was measured on the weights of another encoder; `fullrank reference` builds its own"
        )
    try:
        reference = Reference.from_tensors(tensors)
    except ValueError as error:
        raise ArtifactError(f"{root / REFERENCE}: {error}") from error
    if reference.dimension != card.dimension:
        _refuse(root / REFERENCE, f"it describes {reference.dimension} dimensions, the encoder has {card.dimension}")
    return Artifact(card, encoder, reference, _canary(root, card, reference, images))


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ArtifactError(f"{path}: {reason}")


def _read_card(root: Path) -> EncoderCard:
    path = root / CARD
    try:
        return EncoderCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        _refuse(path, "missing; is this an encoder's folder?")
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(path, f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}")


def _read_tensors(root: Path, name: str, expected: str) -> dict[str, Tensor]:
    path = root / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        _refuse(path, f"missing, though {CARD} lists it")
    if hashlib.sha256(data).hexdigest() != expected:
        _refuse(path, f"its SHA-256 is not the one in {CARD}: it was changed or damaged; restore or re-export it")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        _refuse(path, f"not a safetensors file ({error})")


def _read_encoder(root: Path, card: EncoderCard) -> ResNet:
    path = root / WEIGHTS
    weights = _read_tensors(root, WEIGHTS, card.files[WEIGHTS])
    encoder = card.architecture.build()
    if encoder.dimension != card.dimension:
        _refuse(root / CARD, f"dimension is {card.dimension}, but this architecture has {encoder.dimension}")
    expected = encoder.state_dict()
    if missing := sorted(expected.keys() - weights.keys()):
        _refuse(path, f"{len(missing)} tensor(s) missing, first {missing[0]!r}")
    if unexpected := sorted(weights.keys() - expected.keys()):
        _refuse(path, f"{len(unexpected)} unexpected tensor(s), first {unexpected[0]!r}")
    for name, tensor in expected.items():
        found = weights[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            _refuse(
                path,
                f"{name!r} is {found.dtype} {tuple(found.shape)}, not {tensor.dtype} {tuple(tensor.shape)}",
            )
        if found.is_floating_point() and not torch.isfinite(found).all():
            _refuse(path, f"{name!r} holds values that are not finite")
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval().requires_grad_(False)


def _canary(root: Path, card: EncoderCard, reference: Reference, images: Tensor | None) -> Canary | None:
    if images is None:
        return None
    path, size = root / REFERENCE, card.preprocessing.size
    wanted = (card.preprocessing.channels, size, size)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        _refuse(
            path,
            f"canary images are {images.dtype} {tuple(images.shape)}, not uint8 (m, {', '.join(map(str, wanted))})",
        )
    if reference.canary is None or len(reference.canary) != len(images):
        _refuse(path, "canary images and canary embeddings differ in number")
    return Canary(images, reference.canary, card.canary_licence)
