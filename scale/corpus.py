"""The reference of a whole corpus that was embedded in bulk: from all moments and a uniform sample of the rows."""

import random
from pathlib import Path

import torch

from models import references
from models.artifact import Artifact, load
from models.embedder import Embedder
from models.references import ImagesError
from scale.output import BulkError, Run, merged, sampled
from scale.places import Place


def referenced(
    out: Place,
    encoder: Path,
    *,
    device: str = "cpu",
    engine: str = "auto",
    limit: int = references.LIMIT,
    seed: int = 0,
) -> Artifact:
    """Give the encoder a reference, calibrated on the corpus whose rows lie in `out`, and the synthetic canary.

    At most `limit` rows are drawn, uniformly, without replacement, by `seed`. They depend on the corpus alone, not on
    how often the run was killed. Raises BulkError for rows of another encoder, for a run that kept no descriptors, and
    for a corpus that is too small.
    """
    artifact = load(encoder)
    run = Run.of(out)
    if not run.is_of(artifact.card):
        raise BulkError(f"{out} holds rows of {run.encoder}@{run.revision}, not of {encoder}")
    if not run.inputs:
        raise BulkError(f"{out} holds no descriptors of the images; embed into it with --reference")
    whole = merged(run, out)
    numbers = random.Random(seed).sample(range(whole.count), min(limit, whole.count))
    rows, inputs = sampled(run, out, numbers)
    torch.set_num_threads(1)
    embedder = Embedder(artifact, device, run.torch_dtype, engine=engine)  # type: ignore[arg-type]
    canary = references.synthetic_canary(artifact.card.preprocessing)
    try:
        return references.from_corpus(artifact, rows, inputs, whole, canary, references.SYNTHETIC, embedder=embedder)
    except (ImagesError, ValueError) as error:
        raise BulkError(f"no reference of {out}: {error}") from error
