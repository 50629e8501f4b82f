"""The encoder artifact: a folder with everything that serving needs. It is refused if its files contradict each other.

    encoder.json            the card: name, architecture, preprocessing, training, measured quality, hashes of the rest
    encoder.safetensors     the weights, float32, under the names of their module in models/backbones
    encoder.onnx            optional: pixels (n, c, s, s) uint8 -> rows (n, d) float32 as an ONNX graph whose weights
                            lie in encoder.safetensors. Without an architecture, the graph is the encoder
    reference.safetensors   healthy statistics and the canary images (optional: an imported encoder has none yet)

No file can run code: JSON is validated by pydantic, tensors are safetensors.
"""

import errno
import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from safetensors.torch import save_file
from torch import Tensor

from fullrank.reference import Reference
from fullrank.stored import check_plain, tensors_in
from models.backbones import Encoder
from models.card import (
    GRAPH,
    WEIGHTS,
    AnyArchitecture,
    Architecture,
    EncoderCard,
    Source,
    ViTArchitecture,
    architecture,
)
from models.preprocess import Preprocessing

__all__ = [
    "CARD",
    "GRAPH",
    "REFERENCE",
    "WEIGHTS",
    "AnyArchitecture",
    "Architecture",
    "Artifact",
    "ArtifactError",
    "Canary",
    "EncoderCard",
    "Graph",
    "Preprocessing",
    "Source",
    "ViTArchitecture",
    "architecture",
    "load",
    "save",
]

CARD, REFERENCE = "encoder.json", "reference.safetensors"
CANARY_IMAGES = "canary.images"
MEASURED_ON = "encoder.sha256"  # the identity of the encoder that the reference was measured on


class ArtifactError(ValueError):
    """Raised for an artifact that cannot be trusted. The message names the file and what disagrees."""


@dataclass(frozen=True)
class Canary:
    """Fixed images (m, channels, size, size) uint8, and the encoder's embeddings (m, d) of them at export."""

    images: Tensor
    embeddings: Tensor
    licence: str


@dataclass(frozen=True)
class Graph:
    """An ONNX file, pixels (n, c, s, s) uint8 -> rows (n, d) float32, and its external data by initializer."""

    model: bytes
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Artifact:
    """An encoder with everything that serving needs. `load` returns it and `save` writes it.

    `module` is None if the encoder is an ONNX graph only.
    """

    card: EncoderCard
    module: Encoder | None
    reference: Reference | None = None
    canary: Canary | None = None
    graph: Graph | None = None

    @property
    def encoder(self) -> Encoder:
        """The PyTorch module. Raises ArtifactError if the encoder is an ONNX graph only."""
        if self.module is None:
            raise ArtifactError(f"{self.card.name} is an ONNX graph: it can be served, but not trained")
        return self.module


def save(artifact: Artifact, folder: str | os.PathLike[str]) -> Artifact:
    """Write `artifact` to `folder`, and return it with its file hashes (hence its revision) filled in.

    The write is atomic: everything is written beside the folder first, then renamed into place. An artifact that is
    already there is replaced. What else lies in its folder, such as the log of its training, stays if it is the same
    encoder. Anything else there raises ArtifactError.
    """
    target = Path(folder)
    if target.exists() and not (target / CARD).is_file():
        raise ArtifactError(f"{target} exists and is not an encoder artifact; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        fresh, old = Path(scratch, "new"), Path(scratch, "old")
        fresh.mkdir()
        card = _write(artifact, fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        if old.exists():
            _keep_others(old, target, card)
    return replace(artifact, card=card)


def _keep_others(old: Path, folder: Path, card: EncoderCard) -> None:
    """Take along what is no part of the artifact. Beside another encoder it would be that of the former one."""
    try:
        before = _read_card(old)
    except ArtifactError:
        return
    if before.files.get(WEIGHTS) != card.files[WEIGHTS] or before.identity != card.identity:
        return
    for path in old.iterdir():
        if path.name != CARD and path.name not in before.files and not (folder / path.name).exists():
            path.rename(folder / path.name)


def _write(artifact: Artifact, folder: Path) -> EncoderCard:
    """Write every file of the artifact into an empty folder. Returns the card with their hashes."""
    source = artifact.graph.weights if artifact.module is None and artifact.graph else artifact.encoder.state_dict()
    try:
        save_file({name: tensor.contiguous() for name, tensor in source.items()}, folder / WEIGHTS)
    except SafetensorError as error:  # such as of a full disk
        raise OSError(errno.EIO, str(error), str(folder / WEIGHTS)) from error
    hashes = {WEIGHTS: _sha256(folder / WEIGHTS)}
    if artifact.graph is not None:
        (folder / GRAPH).write_bytes(artifact.graph.model)
        hashes[GRAPH] = _sha256(folder / GRAPH)
    licence = artifact.canary.licence if artifact.canary else ""
    graph = GRAPH if artifact.graph is not None else None
    card = artifact.card.model_copy(update={"files": hashes, "canary_licence": licence, "graph": graph})
    if artifact.reference is not None:
        tensors = {name: tensor.contiguous() for name, tensor in artifact.reference.tensors().items()}
        if artifact.canary is not None:
            tensors[CANARY_IMAGES] = artifact.canary.images.contiguous()
        tensors[MEASURED_ON] = torch.tensor(list(bytes.fromhex(card.identity)), dtype=torch.uint8)
        (folder / REFERENCE).write_bytes(save_tensors(tensors))
        card = card.model_copy(update={"files": hashes | {REFERENCE: _sha256(folder / REFERENCE)}})
    (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    return card


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | os.PathLike[str], *, referenced: bool = True) -> Artifact:
    """Read and check an artifact. The encoder comes back in eval mode, float32, on the CPU.

    referenced: false leaves its reference and canary unread, for a caller that builds others.
    Raises ArtifactError, naming the file and the reason, when a file is missing, was changed since it was written,
    lacks a parameter, has one of another shape, or contradicts the card.
    """
    root = Path(folder)
    try:
        found_there = root.is_dir()
    except OSError as error:  # no permission to look, or a name too long for the file system
        _refuse(root, f"cannot be read: {error.strerror}")
    if not found_there:
        raise ArtifactError(f"{root} is not a folder; an encoder is a folder holding {CARD} and {WEIGHTS}")
    card = _read_card(root)
    if WEIGHTS not in card.files:
        raise ArtifactError(f"{root / CARD} lists no hash for {WEIGHTS}")
    model = _read_graph(root, card)
    weights = _read_weights(root, card)
    graph = None if model is None else Graph(model, weights)
    found = Artifact(card, _encoder(root, card, weights), graph=graph)
    if REFERENCE not in card.files or not referenced:
        return found
    tensors = _read_tensors(root, REFERENCE, card.files[REFERENCE])
    images, measured_on = tensors.pop(CANARY_IMAGES, None), tensors.pop(MEASURED_ON, None)
    if measured_on is not None and not card.is_of(bytes(measured_on.flatten().to(torch.uint8).tolist()).hex()):
        _refuse(
            root / REFERENCE,
            "it was measured on an encoder of other weights, architecture or preprocessing; put those back, or build "
            f"its own with `fullrank reference {root} --replace --data DIR`",
        )
    try:
        reference = Reference.from_tensors(tensors)
    except ValueError as error:
        raise ArtifactError(f"{root / REFERENCE}: {error}") from error
    if reference.dimension != card.dimension:
        _refuse(root / REFERENCE, f"it describes {reference.dimension} dimensions, the encoder has {card.dimension}")
    return replace(found, reference=reference, canary=_canary(root, card, reference, images))


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ArtifactError(f"{path}: {reason}")


def _read_card(root: Path) -> EncoderCard:
    path = root / CARD
    try:
        return EncoderCard.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        _refuse(path, "missing; is this an encoder's folder?")
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(path, f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg'].removeprefix('Value error, ')}")


def _read_bytes(root: Path, name: str, expected: str) -> bytes:
    path = root / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        _refuse(path, f"missing, though {CARD} lists it")
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    if hashlib.sha256(data).hexdigest() != expected:
        _refuse(path, f"its SHA-256 is not the one in {CARD}: it was changed or damaged; restore or re-export it")
    return data


def _read_tensors(root: Path, name: str, expected: str) -> dict[str, Tensor]:
    data = _read_bytes(root, name, expected)
    try:
        tensors = tensors_in(data)
        check_plain(tensors, "tensor")
    except ValueError as error:
        _refuse(root / name, str(error))
    return tensors


def _read_graph(root: Path, card: EncoderCard) -> bytes | None:
    if card.graph is None:
        return None
    if GRAPH not in card.files:
        _refuse(root / CARD, f"it names a graph, but lists no hash for {GRAPH}")
    return _read_bytes(root, GRAPH, card.files[GRAPH])


def _read_weights(root: Path, card: EncoderCard) -> dict[str, Tensor]:
    weights = _read_tensors(root, WEIGHTS, card.files[WEIGHTS])
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            _refuse(root / WEIGHTS, f"{name!r} holds values that are not finite")
    return weights


def _encoder(root: Path, card: EncoderCard, weights: dict[str, Tensor]) -> Encoder | None:
    """The PyTorch module with its weights; None if the encoder is an ONNX graph only."""
    path = root / WEIGHTS
    if card.architecture is None:
        return None
    with torch.device("meta"):
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
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval().requires_grad_(False)


def _canary(root: Path, card: EncoderCard, reference: Reference, images: Tensor | None) -> Canary | None:
    if images is None:
        return None
    path = root / REFERENCE
    size = card.preprocessing.size
    wanted = (card.preprocessing.channels, size, size)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        _refuse(
            path,
            f"canary images are {images.dtype} {tuple(images.shape)}, not uint8 (m, {', '.join(map(str, wanted))})",
        )
    if reference.canary is None or len(reference.canary) != len(images):
        _refuse(path, "canary images and canary embeddings differ in number")
    return Canary(images, reference.canary, card.canary_licence)
