"""From trained weights to an artifact that can be served and watched: quality, reference, canary.

    python -m training.export models/pretrained/fashion-directclr      # calibrate its reference again

reads the split that carries the reference once more, from the data and the seed in the artifact's card.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from models.artifact import Artifact, load, save
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
from training.data import SOURCES, Images, ImageSet, load_split
from training.evaluate import Spectrum, evaluate


def export(
    artifact: Artifact,
    fit: ImageSet,
    held_out: ImageSet,
    train: Images,
    test: Images,
    projection: Spectrum,
    folder: Path,
    progress: Progress = silent,
) -> Artifact:
    """Measure the encoder once on the test set, give it a reference and a canary, and write it to `folder`."""
    source, preprocessing = SOURCES[artifact.card.training["data"]], artifact.card.preprocessing
    canary_rows = min(CANARY_ROWS, len(held_out) // 4)
    quality = evaluate(artifact, train, test) | {"projection": projection.summary()}
    if source.redistributable:
        canary, licence = held_out.images[-canary_rows:], source.licence
    else:
        canary, licence = synthetic_canary(preprocessing), SYNTHETIC
    measured = replace(artifact, card=artifact.card.model_copy(update={"quality": quality}))
    # The canary's images leave the reference's split, so that neither vouches for the other.
    described = held_out.take(slice(0, len(held_out) - canary_rows))
    basis, rest = (in_chunks(images, preprocessing) for images in (fit.images[:BASIS_ROWS], described.images))
    made = with_reference(measured, basis, rest, canary, licence, labels=described.labels, progress=progress)
    return save(made, folder)


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
        held_out = load_split(recipe["data"], options.data, recipe["held_out"], options.limit, recipe["seed"]).held_out
        held_out = held_out.take(slice(0, artifact.reference.rows if artifact.reference is not None else 0))
        # Saving replaces the folder; the logs of the run stay.
        logs = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
        chunks = in_chunks(held_out.images, artifact.card.preprocessing)
        save(recalibrated(artifact, chunks, held_out.labels), folder)
        for path, content in logs.items():
            path.write_bytes(content)
        print(f"{folder}: calibrated on {len(held_out)} images")


if __name__ == "__main__":
    main()
