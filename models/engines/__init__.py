"""Engines run an encoder: pixels (n, c, h, w) uint8 -> rows (n, d) float32. They use onnxruntime or PyTorch.

`start` compares an engine with the plain float32 encoder before it is used.
"""

import contextlib
import copy
import ctypes
import logging

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.artifact import Artifact, ArtifactError
from models.engines.engine import NAMES, Engine, EngineError, Name, Pixels, Rows, affine
from models.engines.onnx_engine import ELSEWHERE, OnnxEngine
from models.engines.small_maps import with_products
from models.engines.torch_engine import TorchEngine
from models.engines.trace import UnsupportedError, trace
from models.preprocess import Preprocessing
from models.processor import emulates_bfloat16

__all__ = ["NAMES", "PARITY_COSINE", "Engine", "EngineError", "Name", "Pixels", "Rows", "at_rest", "sample", "start"]

log = logging.getLogger("fullrank.engines")
PARITY_COSINE = 0.9999
PARITY_IMAGES = 3


def start(
    artifact: Artifact,
    name: Name = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_batch: int = 256,
    threads: int | None = None,
) -> Engine:
    """Start the engine called `name` for the artifact's encoder.

    auto is onnx on a CPU in float32 if the encoder can be written as a graph, and torch otherwise.
    threads: the most threads of one pass; None takes torch's present number. The torch engine uses torch's number at
    every call.

    Raises EngineError if the engine cannot run this encoder on this device, and ArtifactError with the figures if its
    rows for a few images (the canary's, if there is one) differ from those of the plain encoder in float32.
    """
    where = torch.device(device)
    fits = torch.device(device).type == "cpu" and dtype == torch.float32
    if name == "onnx" and not fits:
        raise EngineError(f"the onnx engine runs on a cpu in float32, not on {where} in {dtype}; the torch engine can")
    if where.type == "cpu" and dtype == torch.bfloat16 and emulates_bfloat16():
        log.warning("this processor does not multiply in bfloat16 (AMX, AVX512-BF16): float32 is faster here")
    if artifact.module is None:
        return _of_graph(artifact, name, fits, threads or torch.get_num_threads())
    plain = at_rest(artifact.encoder)
    pixels = sample(artifact)
    expected = None
    engine: Engine | None = None
    if name == "onnx" or (name == "auto" and fits):
        try:
            graph, expected = trace(plain, pixels, *affine(artifact.card.preprocessing))
            graph = with_products(graph)
            engine = OnnxEngine(graph.serialized(ELSEWHERE), graph.weights, threads or torch.get_num_threads())
        except (UnsupportedError, EngineError) as error:
            if name == "onnx":
                raise EngineError(
                    f"{artifact.card.name} has no ONNX graph here: {error}; use the torch engine"
                ) from error
            log.warning("%s runs in the torch engine: there is no ONNX graph of %s", artifact.card.name, error)
    if engine is None:
        engine = TorchEngine(plain, artifact.card.preprocessing, where, dtype, max_batch)
    _check(artifact, engine, pixels, _rows(plain, artifact, pixels) if expected is None else expected, dtype)
    _give_back()
    return engine


def _give_back() -> None:
    """Return freed memory to the system, if the C library can: starting frees more memory than the weights take."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _of_graph(artifact: Artifact, name: Name, fits: bool, threads: int) -> Engine:
    """The onnx engine for an artifact that is an ONNX graph only. Raises EngineError if it cannot run."""
    if name == "torch" or not fits:
        raise EngineError(f"{artifact.card.name} is an ONNX graph: it runs in the onnx engine, on a cpu in float32")
    graph = artifact.graph
    if graph is None:
        raise ArtifactError(f"{artifact.card.name} has neither a module nor a graph")
    engine = OnnxEngine(graph.model, graph.weights, threads)
    pixels = sample(artifact).numpy()
    try:
        rows, alone = engine(pixels), engine(pixels[:1])
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise ArtifactError(f"{artifact.card.name}: its graph fails on images: {str(error).strip()}") from error
    wanted = (PARITY_IMAGES, artifact.card.dimension)
    if rows.dtype != np.float32 or rows.shape != wanted:
        raise ArtifactError(f"{artifact.card.name}: its graph gives {rows.dtype} {rows.shape}, not float32 {wanted}")
    if not np.allclose(rows[:1], alone, rtol=1e-3, atol=1e-4 * float(np.abs(rows).max()), equal_nan=True):
        raise ArtifactError(f"{artifact.card.name}: its graph gives an image another row in a batch than alone")
    return engine


def at_rest(encoder: nn.Module) -> nn.Module:
    """The encoder in eval mode on the CPU. It is copied if it is in training or on another device."""
    tensors = list(encoder.state_dict(keep_vars=True).values())
    if not encoder.training and all(it.device.type == "cpu" and not it.requires_grad for it in tensors):
        return encoder
    return copy.deepcopy(encoder).cpu().eval().requires_grad_(False)


@torch.inference_mode()
def _rows(encoder: nn.Module, artifact: Artifact, pixels: Tensor) -> Tensor:
    scale, offset = affine(artifact.card.preprocessing)
    rows: Tensor = encoder(pixels.float().mul_(scale).add_(offset))
    return rows


def sample(artifact: Artifact) -> Tensor:
    """Three test images (3, c, s, s) uint8: the first of the canary, or smooth random fields if there is none."""
    if artifact.canary is not None and len(artifact.canary.images) >= PARITY_IMAGES:
        return artifact.canary.images[:PARITY_IMAGES].clone()
    how: Preprocessing = artifact.card.preprocessing
    coarse = torch.rand(PARITY_IMAGES, how.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, size=(how.size, how.size), mode="bilinear") * 255).to(torch.uint8)


def _check(artifact: Artifact, engine: Engine, pixels: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise ArtifactError if the engine's rows differ from the plain encoder's. Skips rows that are not finite.

    One image is embedded alone too: an engine may do otherwise with it than with a batch.
    """
    images = pixels.numpy()
    rows = np.concatenate([engine(images), engine(images[:1])]).astype(np.float64)
    wanted = torch.cat([expected, expected[:1]]).double().numpy()
    comparable = np.isfinite(wanted).all(1) & (np.linalg.norm(wanted, axis=1) > 0)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.nan_to_num((rows * wanted).sum(1) / lengths, nan=-1.0)[comparable]
    if len(cosines) and cosines.min() < PARITY_COSINE:
        reduced = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
        remedy = ". Compute in float32 (FULLRANK_DTYPE or --dtype)" if reduced else ""
        raise ArtifactError(
            f"{artifact.card.name}: the {engine.name} engine's embeddings{reduced} have cosine {cosines.min():.6f} "
            f"with those of the plain float32 encoder; at least {PARITY_COSINE} is needed, so it would serve "
            f"something else{remedy}"
        )
