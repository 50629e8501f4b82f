"""Load, warm up and check an encoder from its folder, before it serves any request."""

import asyncio
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import artifact as artifacts
from models import gate as gates
from models.artifact import Artifact, ArtifactError, Canary
from models.embedder import Embedder, least_cosine
from models.engines import PARITY_COSINE
from models.preprocess import prepare_arrays
from service.encoders.served import Candidate
from service.engine.engine import Engine
from service.engine.queue import Rows
from service.failures import InvalidError
from service.settings import Settings
from service.watching.canary import embed_in_turns, noise_of

log = logging.getLogger("fullrank.service")


@dataclass(frozen=True)
class Prepared:
    """An encoder that runs, the embeddings of its own canary images, and the seconds they took; None without canary.

    noise: the angle, in degrees, by which the serving precision turns them; NaN where it is not known.
    """

    candidate: Candidate
    rows: Rows | None
    seconds: float
    noise: float = math.nan


async def read(folder: Path) -> Artifact:
    """Read an encoder from its folder. Raises InvalidError if it cannot be trusted."""
    try:
        return await asyncio.to_thread(artifacts.load, folder)
    except ArtifactError as error:
        raise InvalidError("bad_artifact", str(error), field="name") from error


async def prepare(artifact: Artifact, folder: Path, engine: Engine, settings: Settings) -> Prepared:
    """An encoder ready to serve: on its device, warm, tested. Raises ArtifactError if it fails a test.

    Live requests go first: test images are embedded a few at a time.
    """
    options = settings.device, getattr(torch, settings.dtype), settings.max_batch, settings.engine, settings.threads
    embedder = await engine.call(Embedder, artifact, *options)
    await engine.call(embedder.warm_up, (1,))
    candidate = Candidate(artifact, folder, embedder, settings.max_pixels, settings.max_whole_pixels)
    rows, _ = await embed_in_turns(engine, candidate, gates.synthetic(artifact.card.preprocessing))
    if settings.gate != "off" and (fault := gates.self_test(rows)) is not None:
        _refuse(settings, f"{candidate.name} is not fit to serve: {fault}")
    if artifact.canary is None:
        return Prepared(candidate, None, 0.0)
    rows, seconds = await embed_in_turns(engine, candidate, artifact.canary.images.numpy())
    if (cosine := least_cosine(rows, artifact.canary.embeddings.numpy())) < settings.canary_min_cosine:
        raise ArtifactError(
            f"{artifact.card.name}: its canary images give embeddings of cosine {cosine:.4f} with the stored ones, "
            f"less than {settings.canary_min_cosine}: weights, preprocessing or precision are not what was exported"
        )
    noise = await _noise(candidate, rows, seconds, engine, settings)
    if settings.dtype != "float32" and (cosine := math.cos(math.radians(noise))) < PARITY_COSINE:
        raise ArtifactError(
            f"{artifact.card.name}: in {settings.dtype} its canary images give embeddings of cosine {cosine:.6f} with "
            f"those in float32 or in another batch; at least {PARITY_COSINE} is needed. Set FULLRANK_DTYPE=float32"
        )
    return Prepared(candidate, rows, seconds, noise)


async def _noise(candidate: Candidate, rows: Rows, seconds: float, engine: Engine, settings: Settings) -> float:
    """What the serving precision does to the canary: beside another size of batch, and beside float32."""
    artifact = candidate.artifact
    assert artifact.canary is not None
    exact = None
    if settings.dtype != "float32":
        options = settings.device, torch.float32, settings.max_batch, settings.engine, settings.threads
        embedder = await engine.call(Embedder, artifact, *options)
        exact = Candidate(artifact, candidate.folder, embedder, settings.max_pixels, settings.max_whole_pixels)
    return await noise_of(engine, candidate, exact, artifact.canary.images.numpy(), rows, seconds)


async def judge(prepared: Prepared, against: Artifact | None, engine: Engine) -> gates.Judgement:
    """The gate's judgement, on the incumbent's canary images where it has some; live requests go first."""
    candidate = prepared.candidate
    own = None if prepared.rows is None else torch.from_numpy(prepared.rows)
    incumbent = gates.incumbent_canary(against)
    rows = (
        own
        if incumbent is None or incumbent is candidate.artifact.canary
        else await _rows(candidate, incumbent, engine)
    )
    return await asyncio.to_thread(gates.judge_rows, candidate.artifact, against, rows, own, candidate.embedder.dtype)


async def _rows(candidate: Candidate, canary: Canary, engine: Engine) -> Tensor:
    pixels = await asyncio.to_thread(prepare_arrays, canary.images, candidate.artifact.card.preprocessing)
    rows, _ = await embed_in_turns(engine, candidate, pixels)
    return torch.from_numpy(rows)


async def judge_alone(prepared: Prepared, engine: Engine, settings: Settings) -> None:
    """Refuse an encoder that is collapsed by the gate's floors. Without canary images none can be judged: it serves."""
    if settings.gate == "off" or prepared.candidate.artifact.canary is None:
        return
    judgement = await judge(prepared, None, engine)
    if not judgement.passed:
        _refuse(settings, f"{prepared.candidate.name} is not fit to serve: {judgement.reason}")


def _refuse(settings: Settings, message: str) -> None:
    """Raise ArtifactError if the gate is "enforce"; otherwise log a warning."""
    if settings.gate == "enforce":
        raise ArtifactError(f"{message}. FULLRANK_GATE=warn serves it all the same")
    log.warning(message)
