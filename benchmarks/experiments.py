"""The papers' claims at a length where they can be seen: experiments A to I, each run beside both untrained twins.

    python -m benchmarks.experiments                      # what there is, what it costs, and what has been run
    python -m benchmarks.experiments A [--seeds 3] [--device cuda] [--data DIR] [--minutes 20]
    python -m benchmarks.experiments --write docs/measured/methods.md
    python -m benchmarks.experiments E --log RUN.jsonl    # what `fullrank lab eigenspace-alignment --run` reads
    python -m benchmarks.experiments I --pixels           # measure pixels again for the runs that are there

Every run appends a line to benchmarks/experiments.jsonl, and what is there is not run again. A dimension is dead when
its eigenvalue of the covariance of L2-normalised rows lies under 1e-5 (z) or 1e-4 (h) of the largest.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._experiments_cases import EXPERIMENTS, Case, Experiment, recipe_of
from benchmarks._experiments_claims import claims_table
from benchmarks._experiments_page import Record, page
from benchmarks._page import records_in, write_between
from benchmarks.encoders import PIXELS, pixels
from models.artifact import Artifact
from models.embedder import Embedder
from models.files import write
from training.checkpoint import TrainingError
from training.data import ImageSet, Split, load_data
from training.evaluate import Spectrum, knn_accuracy
from training.finetune import EPOCHS, SHARES, supervised
from training.guard import twins
from training.memory import keep_freed
from training.probe import Protocol, few_labels, linear_probe
from training.trainer import Trainer

DEAD_H, DEAD_Z = 1e-4, 1e-5


def geometry(h: Tensor, z: Tensor, curves: bool = False) -> Record:
    """Ranks, variances and dead dimensions of representations and projections, (n, d) and (n, k).

    With `curves` the eigenvalues too, at a few dozen ranks.
    """
    found: Record = {}
    for name, rows, floor in (("h", h, DEAD_H), ("z", z, DEAD_Z)):
        spectrum = Spectrum.of(rows)
        dead = int((spectrum.eigenvalues < floor * spectrum.eigenvalues[0]).sum())
        found[name] = spectrum.summary() | {"dead": dead} | (spectrum.curve() if curves else {})
    return found


def accuracies(
    bank: Tensor, known: ImageSet, h: Tensor, test: ImageSet, device: str, protocol: Protocol = "lbfgs"
) -> Record:
    """kNN and linear accuracy, computed on `device`. bank and h are the rows of the known and of the test images."""
    x, y, queries, labels = (it.to(device) for it in (bank, known.labels, h, test.labels))
    linear = linear_probe(x, y, queries, labels, protocol=protocol).top1
    return {"knn": knn_accuracy(x, y, queries, labels), "linear": linear}


def fine_tuned(artifact: Artifact, known: ImageSet, test: ImageSet, device: str) -> Record:
    """Top-1 accuracy of the whole encoder fine-tuned on a share of the labels: SimCLR's protocol, the same for all."""
    found = {}
    for name, share in SHARES.items():
        chosen = known.take(few_labels(known.labels, share))
        found[name] = supervised(artifact, chosen, test, device, EPOCHS[name], frozen=False).top1
    return found


def chosen_images(experiment: Experiment, seed: int, data: tuple[ImageSet, ImageSet]) -> tuple[Split, ImageSet]:
    """The training images, cut in those that train and 512 that are held out, and the test images."""
    train, test = data
    whole = experiment.data != "fashion"
    return Split.of(train.take(slice(experiment.images)), 512, seed), test if whole else test.take(slice(2000))


def of_pixels(experiment: Experiment, known: ImageSet, test: ImageSet) -> Record:
    """What raw pixels read, their mean taken off: the bar that needs no network.

    The probe is the encoders' own where that takes seconds, on Fashion-MNIST, and ridge regression on CIFAR-10. With
    few labels it is the encoders' too, on the same images that they are fine-tuned on.
    """
    bank, queries = pixels(PIXELS[1], known, test)
    found = accuracies(bank, known, queries, test, "cpu", "lbfgs" if experiment.data == "fashion" else "ridge")
    for name, share in SHARES.items() if experiment.few_labels else ():
        rows = few_labels(known.labels, share)
        found[name] = linear_probe(bank[rows], known.labels[rows], queries, test.labels).top1
    return found


def run(letter: str, case: Case, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> Record:
    """Train one case; its geometry after every epoch, its accuracies at the end, and both untrained twins'."""
    experiment = EXPERIMENTS[letter]
    split, test = chosen_images(experiment, seed, data)
    record: Record = {"experiment": letter, "name": case.name, "seed": seed, "options": case.options}
    trainer = Trainer(recipe_of(experiment, case, seed), split, device)
    known = split.fit
    assert isinstance(known, ImageSet)
    record["pixels"] = of_pixels(experiment, known, test)
    for twin in twins(trainer):
        embedder = Embedder(twin.artifact, device)
        bank, h = embedder.embed_arrays(known.images), embedder.embed_arrays(test.images)
        found = accuracies(bank, known, h, test, device) | geometry(h, twin.project(h))
        if experiment.few_labels:
            found |= fine_tuned(twin.artifact, known, test, device)
        record[f"untrained_{twin.statistics}"] = found
    clock, epochs = time.process_time if device == "cpu" else time.perf_counter, []
    start = clock()
    try:
        for _ in range(trainer.recipe.epochs):
            loss = trainer.train_epoch()["loss"]
            h = Embedder(trainer.artifact(), device).embed_arrays(test.images)
            alignment = trainer.method.watch().get("predictor_alignment")
            mean = statistics.fmean(alignment) if isinstance(alignment, list) and alignment else None
            epochs.append({"loss": loss, "alignment": mean} | geometry(h, trainer.project(h)))
    except TrainingError as error:
        return record | {"error": str(error)}
    record |= {"seconds": round(clock() - start, 1), "epochs": epochs}
    artifact = trainer.artifact()
    bank = Embedder(artifact, device).embed_arrays(known.images)
    labelled = fine_tuned(artifact, known, test, device) if experiment.few_labels else {}
    return record | accuracies(bank, known, h, test, device) | labelled


def made_before(letter: str, case: Case, seed: int, done: Sequence[Record]) -> Record | None:
    """The record of a run by the same recipe on the same images in another experiment: H's at batch 256 is G's."""
    wanted = EXPERIMENTS[letter]
    for record in done:
        other = EXPERIMENTS[record["experiment"]]
        same = (other.data, other.images, other.few_labels) == (wanted.data, wanted.images, wanted.few_labels)
        cases = [it for it in other.cases if same and record["seed"] == seed and it.name == record["name"]]
        if any(recipe_of(other, it, seed) == recipe_of(wanted, case, seed) for it in cases):
            return record | {"experiment": letter}
    return None


def with_pixels(letter: str, done: Sequence[Record], data: tuple[ImageSet, ImageSet]) -> list[Record]:
    """The records, with pixels measured again beside every run of the experiment."""
    measured: dict[int, Record] = {}
    for seed in {record["seed"] for record in done if record["experiment"] == letter}:
        split, test = chosen_images(EXPERIMENTS[letter], seed, data)
        assert isinstance(split.fit, ImageSet)
        measured[seed] = of_pixels(EXPERIMENTS[letter], split.fit, test)
    return [r | {"pixels": measured[r["seed"]]} if r["experiment"] == letter else r for r in done]


def alignment_log(letter: str, done: list[Record]) -> str:
    """A run's log as the lab on alignment reads it, one line an epoch; only the mean over directions is on record."""
    epochs = next(record["epochs"] for record in done if record["experiment"] == letter and "epochs" in record)
    lines = [{"epoch": at, "predictor_alignment": [it["alignment"]]} for at, it in enumerate(epochs, 1)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/experiments.jsonl"))
    parser.add_argument(
        "--log", type=Path, help="write the alignment by epoch of the experiment's first run, run nothing"
    )
    parser.add_argument("--pixels", action="store_true", help="measure pixels again beside its runs, train nothing")
    parser.add_argument("--write", type=Path, help="replace the experiments' part of this page, run nothing")
    given = parser.parse_args()
    done = records_in(given.results)
    if given.write:
        write_between(given.write, "<!-- experiments -->", "<!-- end of experiments -->", page(done))
        write_between(given.write, "<!-- claims -->", "<!-- end of claims -->", claims_table(done))
    if given.experiment is None:
        print(page(done))
        return
    if given.log:
        given.log.write_text(alignment_log(given.experiment, done))
        return
    if given.device == "cpu":
        keep_freed()
        torch.set_num_threads(1)
    experiment, deadline = EXPERIMENTS[given.experiment], time.monotonic() + 60 * given.minutes
    data: Any = load_data(experiment.data, given.data)
    if given.pixels:
        again = with_pixels(given.experiment, done, data)
        again += records_in(given.results)[len(done) :]  # of runs that ended meanwhile
        write(given.results, "".join(json.dumps(record) + "\n" for record in again))
        return
    for seed in range(given.seeds or experiment.seeds):
        for case in experiment.cases:
            key = (given.experiment, case.name, seed)
            if any((r["experiment"], r["name"], r["seed"]) == key for r in done) or time.monotonic() > deadline:
                continue
            before = made_before(given.experiment, case, seed, done)
            record = before or run(given.experiment, case, seed, data, given.device)
            done.append(record)
            with given.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({k: v for k, v in record.items() if k != "epochs"}), flush=True)


if __name__ == "__main__":
    main()
