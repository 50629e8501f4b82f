"""Every method and its ablations on Fashion-MNIST beside their untrained twins: kNN, probe, ranks; the papers' claims.

    python -m benchmarks.methods [--scale full --device cuda] [--write docs/measured/methods.md]

Same backbone, images, epochs, optimiser and seeds for all. One line of JSON a run in --results; what is there is not
run again, so an interrupted table goes on where it stopped. Test labels only measure: nothing is chosen by them.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._methods_claims import Record
from benchmarks._methods_configurations import SCALES, TWINS, Configuration, Scale, configurations, recipe_of
from benchmarks._methods_page import page
from benchmarks._page import records_in, write_between
from benchmarks.encoders import PIXELS, pixels
from benchmarks.experiments import accuracies, geometry
from models.embedder import Embedder
from training.data import ImageSet, Split, load_data
from training.guard import twins
from training.loop import Trainer, TrainingError
from training.memory import keep_freed


def first_images(scale: Scale, data: tuple[ImageSet, ImageSet]) -> tuple[ImageSet, ImageSet]:
    """The training and the test images that the scale takes."""
    train, test = data
    return train.take(slice(scale.images)), test.take(slice(scale.tests))


def pixel_record(scale: Scale, data: tuple[ImageSet, ImageSet]) -> Record:
    """What raw pixels read in the very same measurements, without their mean; no seed changes it."""
    train, test = first_images(scale, data)
    bank, queries = pixels(PIXELS[1], train, test)
    return {"name": PIXELS[1], "seed": 0} | accuracies(bank, train, queries, test, "cpu")


def twin_records(scale: Scale, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> list[Record]:
    """What both untrained twins read in the very same measurements: SimCLR's heads, no step taken."""
    train, test = first_images(scale, data)
    trainer = Trainer(recipe_of(configurations(scale)[0], scale, seed), Split.of(train, 512, seed), device)
    records = []
    for twin in twins(trainer):
        embedder = Embedder(twin.artifact, device)
        bank, h = embedder.embed_arrays(train.images), embedder.embed_arrays(test.images)
        record = {"name": TWINS[twin.statistics], "seed": seed, "options": {}, "seconds": None, "alignment": None}
        records.append(record | measured(bank, train, h, twin.project(h), test))
    return records


def measured(bank: Tensor, train: ImageSet, h: Tensor, z: Tensor, test: ImageSet) -> Record:
    return accuracies(bank, train, h, test, "cpu") | geometry(h, z, curves=True)


def run(configuration: Configuration, scale: Scale, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> Record:
    """Train once and measure on the test images; what a run that diverged has to say is its error.

    `seconds` are those of training: the process's own on the CPU, whatever else the machine does, else the wall's.
    """
    train, test = first_images(scale, data)
    record: Record = {"name": configuration.name, "seed": seed, "options": configuration.options}
    trainer = Trainer(recipe_of(configuration, scale, seed), Split.of(train, 0, seed), device)
    record["precision"] = trainer.precision
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    try:
        for _ in range(trainer.recipe.epochs):
            record |= {"loss": trainer.train_epoch()["loss"]}
    except TrainingError as error:
        return record | {"error": str(error)}
    record["seconds"] = round(clock() - start, 1)
    embedder = Embedder(trainer.artifact(), device)
    bank, h = embedder.embed_arrays(train.images), embedder.embed_arrays(test.images)
    alignment = trainer.method.watch().get("predictor_alignment")
    mean = statistics.fmean(alignment) if isinstance(alignment, list) and alignment else None
    return record | {"alignment": mean} | measured(bank, train, h, trainer.project(h), test)


def keep(record: Record, results: Path, done: list[Record], console: Console) -> None:
    done.append(record)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
    console.print(json.dumps(record), soft_wrap=True, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run configurations whose name contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/methods.jsonl"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--write", type=Path, help="replace the measured part of this page, run nothing")
    given = parser.parse_args()
    scale, console = SCALES[given.scale], Console(stderr=True)
    done = [record for record in records_in(given.results) if record["scale"] == given.scale]
    if given.write:
        write_between(given.write, "<!-- measured -->", "<!-- end -->", page(given.scale, done))
        return
    if given.device == "cpu":
        keep_freed()
        torch.set_num_threads(1)
    data, deadline = load_data("fashion", given.data), time.monotonic() + 60 * given.minutes
    assert all(isinstance(images, ImageSet) for images in data)
    table = [it for it in configurations(scale) if given.only in it.name]
    pairs = [(it, seed) for seed in range(given.seeds) for it in table if not it.reason]
    pairs += [(it, 0) for it in table if it.reason]
    if given.only in PIXELS[1] and not any(record["name"] == PIXELS[1] for record in done):
        keep({"scale": given.scale, **pixel_record(scale, data)}, given.results, done, console)  # type: ignore[arg-type]
    for configuration, seed in pairs:
        known = {r["name"] for r in done if r["seed"] == seed}
        if given.only in "Untrained" and not known >= set(TWINS.values()):
            for record in twin_records(scale, seed, data, given.device):  # type: ignore[arg-type]
                keep({"scale": given.scale, **record}, given.results, done, console)
        if configuration.name in known or time.monotonic() > deadline:
            continue
        record = {"scale": given.scale, **run(configuration, scale, seed, data, given.device)}  # type: ignore[arg-type]
        keep(record, given.results, done, console)
    print(page(given.scale, done))


if __name__ == "__main__":
    main()
