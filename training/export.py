"""Turns trained weights into an artifact that can be served and watched, with its quality, reference and canary.

    python -m training.export models/pretrained/fashion-directclr      # calibrate its reference again

This command reads the images of the reference again, by the data set and the seed in the artifact's card.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank import Reference
from models.artifact import Artifact, Canary, Graph, load, save
from models.embedder import Embedder, normalize
from models.engines import at_rest, sample
from models.engines.engine import affine
from models.engines.onnx_engine import ELSEWHERE
from models.engines.trace import UnsupportedError, trace
from models.gate import Figures
from models.preprocess import prepare_arrays
from models.references import (
    BASIS_ROWS,
    CANARY_ROWS,
    SYNTHETIC,
    Progress,
    in_chunks,
    recalibrated,
    silent,
    synthetic_canary,
    with_reference,
)
from training.checkpoint import TrainingError
from training.data import SOURCES, Images, ImageSet, load_split
from training.evaluate import NEIGHBOURS, Spectrum, embed, has_labels, quality
from training.guard import Twin, in_words, is_a_point
from training.trainer import Rows, Trainer


def keep(trainer: Trainer, rows: Rows, record: dict[str, Any], folder: Path, count: int) -> None:
    """Write the encoder after an epoch to `folder`/epoch-NNNN, and keep only the last `count` of them.

    It can be served: it has the epoch's measures (`record`), a canary, and a reference made of the rows that were
    measured, which is not calibrated. Raises TrainingError if it cannot be written.
    """
    if not count:
        return
    measured = {key: record[key] for key in ("epoch", "loss", "knn", "guard") if record.get(key) is not None}
    artifact = trainer.artifact()
    artifact = replace(artifact, card=artifact.card.model_copy(update={"quality": {"held_out": measured}}))
    written(servable(quickly_referenced(artifact, trainer, rows)), folder / f"epoch-{record['epoch']:04d}")
    for old in epochs_in(folder)[:-count]:
        shutil.rmtree(old, ignore_errors=True)  # what is left is removed with the next


def written(artifact: Artifact, folder: Path) -> Artifact:
    """`save` it. Raises TrainingError if it cannot be written."""
    try:
        return save(artifact, folder)
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"{folder} cannot be written ({reason}); make room, then --resume") from error


def epochs_in(folder: Path) -> list[Path]:
    """The encoders that `keep` wrote, oldest first."""
    numbers = {path: path.name.removeprefix("epoch-") for path in folder.glob("epoch-*")}
    return sorted((path for path, number in numbers.items() if number.isdigit()), key=lambda path: int(numbers[path]))


def quickly_referenced(artifact: Artifact, trainer: Trainer, rows: Rows) -> Artifact:
    """Give the artifact a reference made of rows that were measured anyway. Unchanged if they all are one point."""
    images, licence, aside = canary_of(trainer.split.held_out, artifact)
    held_out = rows.held_out[: len(trainer.split.held_out) - aside]
    if is_a_point(Figures.of(held_out)):
        return artifact
    expected = normalize(Embedder(artifact, trainer.device).embed_arrays(images))
    reference = Reference.build(rows.bank, held_out, canary=expected, calibrate=False)
    return replace(artifact, reference=reference, canary=Canary(images, expected, licence))


def canary_of(held_out: ImageSet, artifact: Artifact) -> tuple[Tensor, str, int]:
    """Canary images, their licence, and how many of the last held-out images they are.

    They are the data set's own if these may be redistributed, otherwise synthetic.
    """
    source = SOURCES[artifact.card.training["data"]]
    preprocessing = artifact.card.preprocessing
    if not source.redistributable:
        return synthetic_canary(preprocessing), SYNTHETIC, 0
    count = min(CANARY_ROWS, len(held_out) // 4)
    own = torch.from_numpy(prepare_arrays(held_out.images[-count:], preprocessing))
    return own, source.licence, count


def finish(
    trainer: Trainer,
    test: Images | None,
    twins: Sequence[Twin],
    folder: Path,
    limit: int | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Measure the encoder and its untrained twin once on the test set, and write the encoder to `folder`.

    Without a test set they are measured on the held-out images.
    """
    split = trainer.split
    artifact = trainer.artifact()
    asked = test if test is not None else split.held_out
    bank = split.known() if limit is None else split.labelled
    embedder = Embedder(artifact, trainer.device)
    labelled = has_labels(split.labelled.labels, NEIGHBOURS) and test is not None
    total = len(asked) + (len(bank) if labelled else 0)
    queries = embed(embedder, asked, lambda n: progress("measuring", n, total))
    labelled &= has_labels(queries[1])
    known = embed(embedder, bank, lambda n: progress("measuring", n, total)) if labelled else queries
    found = quality(*known, *queries, labelled=labelled) | {
        "projection": Spectrum.of(trainer.project(queries[0])).summary()
    }
    if isinstance(bank, ImageSet) and isinstance(asked, ImageSet) and "knn" in found:
        found["untrained"] = untrained(twins, bank, asked, trainer.device, progress)
    figures = Figures.of(queries[0])
    if is_a_point(figures):
        found["collapsed"] = in_words(figures)
    fit = split.fit if isinstance(split.fit, ImageSet) else split.labelled
    artifact = replace(artifact, card=artifact.card.model_copy(update={"quality": found}))
    return export(artifact, fit, split.held_out, folder, progress)


def untrained(
    twins: Sequence[Twin], bank: ImageSet, asked: ImageSet, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """kNN accuracy of both untrained twins. `knn` is the better one's, with which a trained encoder is compared."""
    found = {}
    for twin in twins:
        embedder = Embedder(twin.artifact, device)
        rows = [
            embed(embedder, images, lambda n: progress("measuring the untrained twin", n)) for images in (bank, asked)
        ]
        found[f"knn_{twin.statistics}"] = quality(*rows[0], *rows[1])["knn"]
    return {"knn": max(found.values())} | found


def export(
    artifact: Artifact, fit: ImageSet, held_out: ImageSet, folder: Path, progress: Progress = silent
) -> Artifact:
    """Give a measured encoder its reference and canary, and write it to `folder`.

    An encoder that maps all images to one point gets no reference. Its card says so, as `quality.collapsed`.
    """
    if "collapsed" in artifact.card.quality:
        return written(servable(artifact), folder)
    images, licence, aside = canary_of(held_out, artifact)
    # The canary's images are not in the reference, so that the two are independent.
    described = held_out.take(slice(0, len(held_out) - aside))
    preprocessing = artifact.card.preprocessing
    basis, rest = (in_chunks(part, preprocessing) for part in (fit.images[:BASIS_ROWS], described.images))
    labels = described.labels if int(described.labels.min()) >= 0 else None
    made = with_reference(artifact, basis, rest, images, licence, labels=labels, progress=progress)
    return written(servable(made), folder)


def servable(artifact: Artifact) -> Artifact:
    """The artifact in a form that can be served: a plugin's backbone becomes an ONNX graph; others are unchanged.

    Raises TrainingError if the backbone cannot be written as an ONNX graph.
    """
    if artifact.card.architecture is not None or artifact.module is None:
        return artifact
    scale, offset = affine(artifact.card.preprocessing)
    try:
        graph, _ = trace(at_rest(artifact.module), sample(artifact), scale, offset)
    except UnsupportedError as error:
        raise TrainingError(
            f"the backbone has no ONNX graph, and cannot be served without its plugin: {error}"
        ) from error
    return replace(artifact, module=None, graph=Graph(graph.serialized(ELSEWHERE), graph.weights))


def main() -> None:
    """Calibrate the references of encoders trained here, in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, help="where the data set lies")
    parser.add_argument("--limit", type=int, help="the --limit of the training run")
    options = parser.parse_args()
    for folder in options.encoders:
        artifact = load(folder)
        recipe = artifact.card.training
        if artifact.reference is None or "held_out" not in recipe:
            parser.error(f"{folder} has no reference that a run of `fullrank train` made; see `fullrank reference`")
        known = recipe["held_out"], options.limit, recipe["seed"], recipe.get("image_size")
        held_out = load_split(recipe["data"], options.data, *known).held_out
        held_out = held_out.take(slice(0, artifact.reference.rows))
        # Saving replaces the folder; the logs of the run stay.
        logs = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
        chunks = in_chunks(held_out.images, artifact.card.preprocessing)
        save(recalibrated(artifact, chunks, held_out.labels), folder)
        for path, content in logs.items():
            path.write_bytes(content)
        print(f"{folder}: calibrated on {len(held_out)} images")


if __name__ == "__main__":
    main()
