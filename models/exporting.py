"""Exports an encoder for other tools: as an ONNX graph, a torch.export program, or bare weights with their card.

Each form takes pixels (n, c, s, s) uint8, prepared as the card says, and returns rows (n, d) float32, not normalised.
Each file is read back and run before it is kept. If its rows differ from the encoder's by more than TOLERANCE, it is
an ExportError.
"""

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from models.artifact import GRAPH, WEIGHTS, Artifact, save
from models.engines import Pixels, Rows, at_rest, sample
from models.engines.engine import affine
from models.engines.onnx_engine import session_options
from models.engines.runtime import onnxruntime
from models.engines.trace import PIXELS, RECORD, ROWS, UnsupportedError, trace

PROGRAM = "encoder.pt2"
TOLERANCE = 1e-4  # relative to the largest coordinate of a row


class ExportError(ValueError):
    """Raised for an encoder that cannot be exported in this form. The message says why and what can be done."""


class Whole(nn.Module):
    """The encoder with its normalisation by mean and std: pixels (n, c, s, s) uint8 -> rows (n, d) float32."""

    scale: Tensor
    offset: Tensor

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.encoder = at_rest(artifact.encoder)
        scale, offset = affine(artifact.card.preprocessing)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.encoder(pixels.float() * self.scale + self.offset)
        return rows


def to_safetensors(artifact: Artifact, folder: Path) -> list[Path]:
    """Write the card and the weights, bit for bit: an artifact without a reference. `fullrank import` reads it too."""
    done = save(replace(artifact, reference=None, canary=None), folder)
    return [folder / name for name in ("encoder.json", *done.card.files)]


def to_onnx(artifact: Artifact, folder: Path) -> list[Path]:
    """Write encoder.onnx, a small file that refers to weights in encoder.safetensors, which is written if missing."""
    if artifact.module is None:
        raise ExportError(f"{artifact.card.name} is an ONNX graph already: copy its {GRAPH} and {WEIGHTS}")
    try:
        graph, _ = trace(at_rest(artifact.encoder), sample(artifact), *affine(artifact.card.preprocessing))
    except UnsupportedError as error:
        message = f"{artifact.card.name} has no ONNX graph here: {error}; --torch-export can write it"
        raise ExportError(message) from error
    state = {name: tensor.contiguous() for name, tensor in artifact.encoder.state_dict().items()}
    weights = folder / WEIGHTS
    content = weights.read_bytes() if weights.is_file() else b""
    fresh = save_tensors(state)
    if content and content != fresh:
        raise ExportError(f"{weights} holds other weights; choose another folder with --out")
    model = graph.serialized(WEIGHTS, offsets(fresh), {RECORD: _record(artifact)})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        trial = Path(scratch)
        (trial / WEIGHTS).write_bytes(fresh)
        (trial / GRAPH).write_bytes(model)
        _check(artifact, _read_onnx(trial / GRAPH), "onnxruntime")
        (trial / GRAPH).replace(folder / GRAPH)
        if not content:
            (trial / WEIGHTS).replace(weights)
    return [folder / GRAPH, weights]


def _record(artifact: Artifact) -> str:
    """What an ONNX graph does not say of an encoder, above all how images become its pixels, as JSON."""
    card = artifact.card
    licence = card.source.licence if card.source is not None else ""
    known = {"name": card.name, "preprocessing": card.preprocessing.model_dump(mode="json"), "licence": licence}
    return json.dumps(known | {"nested_dimensions": card.nested_dimensions})


def to_torch_export(artifact: Artifact, folder: Path) -> list[Path]:
    """Write encoder.pt2, for torch.export.load and any batch size. That loader unpickles: load only your own files."""
    if artifact.module is None:
        raise ExportError(f"{artifact.card.name} is an ONNX graph: no PyTorch module can be made of it")
    pixels = sample(artifact)
    whole = Whole(artifact).eval()
    program = torch.export.export(whole, (pixels,), dynamic_shapes={"pixels": {0: torch.export.Dim("n")}})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pt2-") as scratch:
        trial = Path(scratch, PROGRAM)
        torch.export.save(program, trial)
        read = torch.export.load(trial).module()
        with torch.inference_mode():
            _check(artifact, lambda given: read(torch.from_numpy(given)).numpy(), "torch.export")
        trial.replace(folder / PROGRAM)
    return [folder / PROGRAM]


FORMS: dict[str, Callable[[Artifact, Path], list[Path]]] = {
    "onnx": to_onnx,
    "torch-export": to_torch_export,
    "safetensors": to_safetensors,
}


def _read_onnx(path: Path) -> Callable[[Pixels], Rows]:
    """Load the file with plain onnxruntime, as any other tool would."""
    session = onnxruntime.InferenceSession(str(path), session_options(1))
    return lambda pixels: session.run([ROWS], {PIXELS: pixels})[0]


def offsets(content: bytes) -> dict[str, int]:
    """The byte at which each tensor of a safetensors file begins. `content` needs only the file's header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return {name: 8 + length + it["data_offsets"][0] for name, it in header.items() if name != "__metadata__"}


@torch.inference_mode()
def _check(artifact: Artifact, run: Callable[[Pixels], Rows], reader: str) -> None:
    pixels = sample(artifact)
    for count in (len(pixels), 1):
        wanted = Whole(artifact).eval()(pixels[:count]).numpy()
        worst = float(np.abs(run(pixels[:count].numpy()) - wanted).max() / max(1.0, float(np.abs(wanted).max())))
        if not worst <= TOLERANCE:
            message = f"{reader} answers {worst:.2e} off the encoder, more than {TOLERANCE:g}; nothing was written"
            raise ExportError(message)
