"""The papers' claims at a length where they can be seen: experiments A to I, each run beside both untrained twins.

    python -m benchmarks.experiments                      # what there is, what it costs, and what has been run
    python -m benchmarks.experiments A [--seeds 3] [--device cuda] [--data DIR] [--minutes 20]
    python -m benchmarks.experiments --write docs/measured/methods.md

Every run appends a line to benchmarks/experiments.jsonl, and what is there is not run again. A dimension is dead when
its eigenvalue of the covariance of L2-normalised rows lies under 1e-5 (z) or 1e-4 (h) of the largest.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._page import write_between
from benchmarks.encoders import PIXELS, pixels
from models.artifact import Architecture, Artifact
from models.embedder import Embedder
from training.augment import SIMCLR_CIFAR
from training.checkpoint import TrainingError
from training.data import ImageSet, Split, load_data
from training.evaluate import Spectrum, knn_accuracy
from training.finetune import EPOCHS, SHARES, supervised
from training.guard import twins
from training.probe import few_labels, linear_probe
from training.recipes import Recipe, recipe
from training.recipes.fashion import GENTLE
from training.trainer import Trainer

Record = dict[str, Any]
DEAD_H, DEAD_Z = 1e-4, 1e-5
CONTRAST = {"temperature": 0.2}
SIAM = {"projection": 512, "bottleneck": 128}
BARE_SIAM = SIAM | {"projector": False}
BARE_BYOL = {"projector": False, "momentum": 0.97}


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    """None: the experiment's."""


@dataclass(frozen=True)
class Experiment:
    """Cases on the same data for the same number of epochs, and what they are to show."""

    says: str
    data: str
    images: int | None
    width: int
    epochs: int
    cases: tuple[Case, ...]
    cpu_hours: float
    """Of one thread of this project's development machine, all cases and seeds: an estimate."""
    gpu_hours: float
    """Of one H100 at 200 TFLOP/s, from the number of multiplications: an estimate, not a measurement."""
    seeds: int = 2
    few_labels: bool = False
    """Fine-tune on 1 % and 10 % of the labels as well."""
    settings: dict[str, Any] = field(default_factory=dict)


def _linear(name: str, method: str = "directpred", **options: Any) -> Case:
    return Case(name, method, {"momentum": 0.99} | options)


LINEAR = (
    _linear("BYOL, linear predictor", "byol", linear_predictor=True, constant_momentum=True),
    _linear("DirectPred"),
    _linear("DirectPred, epsilon 0.01", epsilon=0.01),
    _linear("DirectPred, as released", variant="released"),
    _linear("DirectPred, as released, epsilon 0.1", variant="released", epsilon=0.1),
    _linear("DirectPred, optimal predictor", variant="optimal"),
    _linear("DirectCopy", "directcopy"),
)
TIAN = {"batch_size": 128, "learning_rate": 0.06, "weight_decay": 2e-4, "schedule": "constant", "warmup": 0.0}
SIMCLR_ON_CIFAR: dict[str, Any] = {"augmentation": SIMCLR_CIFAR, "batch_size": 128, "learning_rate": 0.3}
PROJECTORS = tuple(
    Case(f"SimCLR, {kind} projector", "simclr", {"temperature": 0.5, "projector": kind})
    for kind in ("mlp", "linear", "none")
)


BARLOW = {"projection": 512, "hidden": 512, "scale": 0.1}


def _batches(equal_steps: int | None = None) -> tuple[Case, ...]:
    """Five batch sizes, two rates, two methods; with `equal_steps` the epochs that a batch of 256 takes, the others'
    grow and shrink with the batch, so that all take as many steps."""
    cases = []
    for size in (64, 128, 256, 512, 1024):
        epochs = equal_steps * size // 256 if equal_steps else None
        for rate in (0.5, 1.0):
            lars = {"optimizer": "lars", "batch_size": size, "learning_rate": rate * size / 256}
            named = f"batch {size}, rate {rate}"
            cases.append(Case(f"SimCLR, {named}", "simclr", {"temperature": 0.5}, lars, epochs))
            cases.append(Case(f"Barlow Twins, {named}", "barlow-twins", BARLOW, lars, epochs))
    return tuple(cases)


FEW_LABELS = (
    Case("SimCLR", "simclr", {"temperature": 0.2}),
    Case("BYOL", "byol", {"momentum": 0.99}),
    Case("Barlow Twins", "barlow-twins", BARLOW | {"scale": 0.02}),
)


EXPERIMENTS: dict[str, Experiment] = {
    "A": Experiment(
        "SimCLR's z loses dimensions as it trains, and more of them with more weight decay (Jing et al., figure 2)",
        "fashion",
        4096,
        16,
        8,
        tuple(Case(f"SimCLR, weight decay {d:g}", "simclr", CONTRAST, {"weight_decay": d}) for d in (1e-4, 1e-3, 3e-3)),
        0.2,
        0.02,
        3,
        settings={"batch_size": 64, "learning_rate": 0.3},
    ),
    "B": Experiment(
        "the tails of h and z without a projector, with a linear one, an MLP, and DirectCLR (figures 7 and 9)",
        "cifar10",
        None,
        32,
        9,
        (*PROJECTORS, Case("DirectCLR", "directclr", {"temperature": 0.5, "d0": 45})),
        5,
        0.1,
        2,
        settings=SIMCLR_ON_CIFAR,
    ),
    "C": Experiment(
        "without projector, stop-gradient and predictor keep h from collapsing (Tian et al.; Chen & He)",
        "fashion",
        4096,
        16,
        3,
        (
            Case("BYOL, no projector", "byol", BARE_BYOL),
            Case(
                "BYOL, no projector, no predictor", "byol", {"projector": False, "momentum": 0.97, "predictor": False}
            ),
            Case("BYOL, no projector, no stop-gradient", "byol", BARE_BYOL | {"stop_gradient": False}),
            Case("SimSiam, no projector", "simsiam", BARE_SIAM),
            Case("SimSiam, no projector, no predictor", "simsiam", BARE_SIAM | {"predictor": False}),
            Case(
                "SimSiam, no projector, no stop-gradient",
                "simsiam",
                SIAM | {"projector": False, "stop_gradient": False},
            ),
        ),
        0.2,
        0.02,
        3,
        settings={"batch_size": 64, "learning_rate": 0.2 * math.sqrt(0.5)},
    ),
    "D": Experiment(
        "DirectPred is better than a gradient-trained linear predictor and on par with BYOL's two layers (Tian et al.)",
        "cifar10",
        None,
        16,
        30,
        (Case("BYOL, two layers", "byol", {"momentum": 0.99, "constant_momentum": True}), *LINEAR),
        7,
        0.3,
        2,
        settings=TIAN,
    ),
    "E": Experiment(
        "the trained linear predictor aligns with its input's eigenspace (Tian et al., figure 2)",
        "cifar10",
        None,
        16,
        50,
        LINEAR[:1],
        1.5,
        0.1,
        1,
        settings=TIAN,
    ),
    "F": Experiment(
        "linear probe: DirectCLR over SimCLR with a linear projector (62.7 against 61.1 on ImageNet)",
        "cifar10",
        None,
        32,
        20,
        (PROJECTORS[1], Case("DirectCLR", "directclr", {"temperature": 0.5, "d0": 45})),
        9,
        0.2,
        3,
        settings=SIMCLR_ON_CIFAR,
    ),
    "G": Experiment(
        "Barlow Twins needs smaller batches than SimCLR, equal numbers of epochs (Zbontar et al., figure 2)",
        "cifar10",
        None,
        16,
        20,
        _batches(),
        11,
        0.5,
        1,
        settings={"augmentation": SIMCLR_CIFAR},
    ),
    "H": Experiment(
        "as G, equal numbers of steps",
        "cifar10",
        None,
        16,
        20,
        _batches(equal_steps=20),
        17,
        0.8,
        1,
        settings={"augmentation": SIMCLR_CIFAR},
    ),
    "I": Experiment(
        "fine-tuned on 1 % or 10 % of the labels, Barlow Twins is on par or better (Zbontar et al., table 2)",
        "fashion",
        20_000,
        16,
        10,
        FEW_LABELS,
        0.5,
        0.05,
        3,
        few_labels=True,
        settings={"batch_size": 128, "learning_rate": 0.2},
    ),
}


def recipe_of(experiment: Experiment, case: Case, seed: int) -> Recipe:
    base = recipe(f"{experiment.data}-{case.method}")
    channels: Any = 1 if experiment.data == "fashion" else 3
    architecture = Architecture(name="resnet18", width=experiment.width, in_channels=channels, stem="3x3/2")
    plain: dict[str, Any] = {"optimizer": "sgd", "schedule": "cosine", "warmup": 0.05, "weight_decay": 1e-4}
    if experiment.data == "fashion":
        plain["augmentation"] = GENTLE
    settings = plain | {"second": None, "clip": None, "bias_lr_scale": 1.0} | experiment.settings | case.settings
    return replace(
        base,
        architecture=architecture,
        options=case.options,
        epochs=case.epochs or experiment.epochs,
        seed=seed,
        **settings,
    )


def geometry(h: Tensor, z: Tensor) -> Record:
    """Ranks, variances and dead dimensions of representations and projections, (n, d) and (n, k)."""
    found: Record = {}
    for name, rows, floor in (("h", h, DEAD_H), ("z", z, DEAD_Z)):
        spectrum = Spectrum.of(rows)
        dead = int((spectrum.eigenvalues < floor * spectrum.eigenvalues[0]).sum())
        found[name] = spectrum.summary() | {"dead": dead}
    return found


def accuracies(bank: Tensor, known: ImageSet, h: Tensor, test: ImageSet) -> Record:
    return {
        "knn": knn_accuracy(bank, known.labels, h, test.labels),
        "linear": linear_probe(bank, known.labels, h, test.labels).top1,
    }


def fine_tuned(artifact: Artifact, known: ImageSet, test: ImageSet, device: str) -> Record:
    """Top-1 accuracy of the whole encoder fine-tuned on a share of the labels: SimCLR's protocol, the same for all."""
    found = {}
    for name, share in SHARES.items():
        chosen = known.take(few_labels(known.labels, share))
        found[name] = supervised(artifact, chosen, test, device, EPOCHS[name], frozen=False).top1
    return found


def run(letter: str, case: Case, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> Record:
    """Train one case; its geometry after every epoch, its accuracies at the end, and both untrained twins'."""
    experiment = EXPERIMENTS[letter]
    train, test = (images.take(slice(n)) for images, n in zip(data, (experiment.images, 2000), strict=True))
    if experiment.data != "fashion":
        test = data[1]
    record: Record = {"experiment": letter, "name": case.name, "seed": seed, "options": case.options}
    trainer = Trainer(recipe_of(experiment, case, seed), Split.of(train, 512, seed), device)
    known = trainer.split.fit
    assert isinstance(known, ImageSet)
    record["pixels"] = {key: value for key, value in pixels(PIXELS[1], known, test).items() if key in ("knn", "linear")}
    for twin in twins(trainer):
        embedder = Embedder(twin.artifact, device)
        bank, h = embedder.embed_arrays(known.images), embedder.embed_arrays(test.images)
        found = accuracies(bank, known, h, test) | geometry(h, twin.project(h))
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
    return record | accuracies(bank, known, h, test) | labelled


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean and its standard error over the seeds."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def table(letter: str, records: Sequence[Record]) -> list[str]:
    """One experiment's rows: each case after its last epoch, and both untrained twins."""
    shares = {"finetune_one_percent": "1 % of labels", "finetune_ten_percent": "10 %"}
    scores = {"knn": "kNN %", "linear": "linear %"} | (shares if EXPERIMENTS[letter].few_labels else {})
    heads = [*scores.values(), "variance of h", "dead of h", "dead of z", "dead of z by epoch", "seeds"]
    lines = ["", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    mine = [r for r in records if r["experiment"] == letter and "error" not in r]
    once = {r["seed"]: r for r in mine}.values()  # pixels and twins are the same beside every case of a seed
    rows = [(f"untrained, {it} statistics", [r[f"untrained_{it}"] for r in once]) for it in ("initial", "measured")]
    for case in EXPERIMENTS[letter].cases:
        rows.append((case.name, [r | r["epochs"][-1] for r in mine if r["name"] == case.name]))
    for given in list(once)[:1]:
        cells = [f"{100 * given['pixels'][key]:.1f}" if key in given["pixels"] else "" for key in scores]
        lines.append(f"| {PIXELS[1]} | " + " | ".join([*cells, *[""] * (len(heads) - len(cells))]) + " |")
    for name, found in rows:
        if not found:
            lines.append(f"| {name} | not run |" + " |" * (len(heads) - 1))
            continue
        course = ", ".join(str(it["z"]["dead"]) for it in found[0].get("epochs", []))
        cells = [_mean([100 * r[key] for r in found], 1) for key in scores]
        cells.append(_mean([r["h"]["total_variance"] for r in found], 3))
        cells += [f"{_mean([r[s]['dead'] for r in found], 1)} of {found[0][s]['dimension']}" for s in ("h", "z")]
        lines.append(f"| {name} | " + " | ".join([*cells, course, str(len(found))]) + " |")
    return lines


def page(records: Sequence[Record]) -> str:
    lines = ["| | what it is to show | status | CPU hours | GPU hours | command |", "|---|---|---|---|---|---|"]
    for letter, it in EXPERIMENTS.items():
        done = sum(record["experiment"] == letter for record in records)
        wanted = len(it.cases) * it.seeds
        status = f"{done} of {wanted} runs" if done else "not run; needs a GPU or the CPU hours"
        command = f"`python -m benchmarks.experiments {letter}`"
        lines.append(f"| {letter} | {it.says} | {status} | {it.cpu_hours:g} | {it.gpu_hours:g} | {command} |")
    for letter in EXPERIMENTS:
        if any(record["experiment"] == letter for record in records):
            lines += ["", f"**{letter}: {EXPERIMENTS[letter].says}.**", *table(letter, records)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/experiments.jsonl"))
    parser.add_argument("--write", type=Path, help="replace the experiments' part of this page, run nothing")
    given = parser.parse_args()
    done = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    if given.write:
        write_between(given.write, "<!-- experiments -->", "<!-- end of experiments -->", page(done))
    if given.experiment is None:
        print(page(done))
        return
    torch.set_num_threads(1) if given.device == "cpu" else None
    experiment, deadline = EXPERIMENTS[given.experiment], time.monotonic() + 60 * given.minutes
    data: Any = load_data(experiment.data, given.data)
    for seed in range(given.seeds or experiment.seeds):
        for case in experiment.cases:
            key = (given.experiment, case.name, seed)
            if any((r["experiment"], r["name"], r["seed"]) == key for r in done) or time.monotonic() > deadline:
                continue
            record = run(given.experiment, case, seed, data, given.device)
            done.append(record)
            with given.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps({k: v for k, v in record.items() if k != "epochs"}), flush=True)


if __name__ == "__main__":
    main()
