"""The table of encoders: each beside raw pixels and beside its untrained twin, with the spectrum of what each serves.

    python -m benchmarks.encoders [FOLDER ...] [--dataset fashion] [--data DIR] [--seeds 3] [--results FILE]
    python -m benchmarks.encoders --results FILE --write docs/measured/encoders.md   # the page from what was measured

Weighted kNN (k = 20, temperature 0.07), bank all training images, queries all test images; a linear probe by L-BFGS on
all labels. The standard error of an accuracy p over n test images is sqrt(p (1 - p) / n).

The untrained twin is the same architecture with random weights. BatchNorm in evaluation mode divides by statistics that
training gathers, so there are two twins: one with the initial statistics (mean 0, variance 1), one whose statistics
were measured on training images. The better of the two is the bar for an accuracy. A twin's row is the mean of its
seeds with the standard deviation between them.

Pixels are in [0, 1], flattened. Without their mean is the fairer baseline: the cosine similarity of vectors that are
all positive sees mostly their common brightness.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._page import records_in, write_between
from models.artifact import Artifact, load
from models.card import EncoderCard
from tools.demo import COLLAPSED, PRETRAINED
from training.data import SOURCES, ImageSet, load_data
from training.evaluate import evaluate, quality
from training.probe import linear_probe

Record = dict[str, Any]
Key = tuple[str, str, int]
"""Name, kind and seed."""
Measure = Callable[[], Record]
PIXELS = "raw pixels", "raw pixels, mean taken off"
RESULTS = Path("benchmarks/encoders.jsonl")
STATISTICS_ROWS, CHUNK = 10_000, 500
TWINS = {"initial": "untrained, initial BatchNorm statistics", "measured": "untrained, statistics of the data"}
MARKS = "<!-- measured: {} -->", "<!-- end: {} -->"


def twin(card: EncoderCard, images: Tensor, seed: int, statistics_of: str) -> Artifact:
    """The card's architecture with random weights; `statistics_of` is a key of TWINS, images (n, c, h, w) uint8."""
    if card.architecture is None:
        raise ValueError(f"{card.name} is a graph: it has no untrained twin")
    torch.manual_seed(seed)
    encoder: Any = card.architecture.build()
    if statistics_of == "measured":
        measure_statistics(encoder, images, card)
    return Artifact(card, encoder.eval())


@torch.no_grad()
def measure_statistics(encoder: nn.Module, images: Tensor, card: EncoderCard) -> None:
    """Set every BatchNorm's running mean and variance to their averages over batches of (n, c, h, w) uint8 images."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (card.preprocessing.mean, card.preprocessing.std))
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average
    encoder.train()
    for chunk in torch.split(images[:STATISTICS_ROWS], CHUNK):
        encoder((chunk.float() / 255 - mean) / std)
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum


def pixels(name: str, train: ImageSet, test: ImageSet) -> tuple[Tensor, Tensor]:
    """The rows (n, c h w) of one of PIXELS, of the training images and of the test's."""
    bank, queries = (images.images.flatten(1).float() / 255 for images in (train, test))
    if name != PIXELS[1]:
        return bank, queries
    mean = bank.mean(0)
    return bank - mean, queries - mean


def of_pixels(name: str, train: ImageSet, test: ImageSet) -> Record:
    """One of PIXELS. The probe is ridge regression, which has a closed form, and cannot tell the two apart."""
    bank, queries = pixels(name, train, test)
    linear = linear_probe(bank, train.labels, queries, test.labels, protocol="ridge").top1
    return {"linear": round(linear, 4)} | quality(bank, train.labels, queries, test.labels)


def measured(artifact: Artifact, train: ImageSet, test: ImageSet) -> Record:
    found = evaluate(artifact, train, test, probes=True)
    return {"linear": found["linear_top1"]} | {key: value for key, value in found.items() if "linear" not in key}


def plan(folders: Sequence[Path], train: ImageSet, test: ImageSet, seeds: int) -> Iterator[tuple[Key, Measure]]:
    """What to measure, by key: pixels, encoders, and the twins of each architecture once."""
    for name in PIXELS:
        yield (name, "pixels", 0), partial(of_pixels, name, train, test)
    artifacts = [load(folder) for folder in folders]
    for artifact in artifacts:
        yield (
            (artifact.card.name, "encoder", artifact.card.training.get("seed", 0)),
            partial(trained, artifact, train, test),
        )
    shapes = {label(artifact.card): artifact.card for artifact in artifacts if artifact.card.architecture is not None}
    for seed in range(seeds):
        for shape, card in shapes.items():
            for kind in TWINS:
                yield (shape, kind, seed), partial(untrained, card, kind, seed, train, test)


def trained(artifact: Artifact, train: ImageSet, test: ImageSet) -> Record:
    card = artifact.card
    about = {key: card.training.get(key) for key in ("epochs", "precision", "command")}
    about |= {"projection": card.quality.get("projection"), "revision": card.revision}
    return about | measured(artifact, train, test)


def untrained(card: EncoderCard, kind: str, seed: int, train: ImageSet, test: ImageSet) -> Record:
    return measured(twin(card, train.images, seed, kind), train, test)


def label(card: EncoderCard) -> str:
    """An architecture in words."""
    if card.architecture is None:
        return "graph"
    shape = card.architecture.model_dump(exclude_defaults=True, exclude={"name", "in_channels"})
    return ", ".join([card.architecture.name, *(f"{key} {value}" for key, value in shape.items())])


def table(found: Sequence[Record]) -> str:
    """The measured table of one data set in Markdown."""
    head = ["", "epochs", "kNN %", "linear probe %", "effective rank", "participation ratio", "total variance"]
    lines = ["| " + " | ".join([*head, "rank of the projection", "seeds"]) + " |", "|---" * 9 + "|"]
    lines += [row(r["name"], [r]) for r in found if r["kind"] == "pixels"]
    for shape in dict.fromkeys(r["name"] for r in found if r["kind"] in TWINS):
        for kind, words in TWINS.items():
            lines.append(row(f"{shape}, {words}", [r for r in found if r["name"] == shape and r["kind"] == kind]))
    lines += [row(f"**{r['name']}**", [r]) for r in found if r["kind"] == "encoder"]
    return "\n".join(lines)


def row(name: str, mine: Sequence[Record]) -> str:
    """One row: accuracies in per cent with a standard error, or between seeds where there are several."""
    first = mine[0]
    projection = first.get("projection")
    cells = [
        name,
        str(first.get("epochs") or ""),
        *(accuracy([r[key] for r in mine], first["knn_queries"]) for key in ("knn", "linear")),
        f"{statistics.fmean(r['effective_rank'] for r in mine):.1f} of {first['dimension']}",
        f"{statistics.fmean(r['participation_ratio'] for r in mine):.1f}",
        f"{statistics.fmean(r['total_variance'] for r in mine):.3f}",
        f"{projection['effective_rank']:.1f} of {projection['dimension']}" if projection else "",
        str(len(mine)) if first["kind"] != "pixels" else "",
    ]
    return "| " + " | ".join(cells) + " |"


def accuracy(values: Sequence[float], n: int) -> str:
    """Mean in per cent, with the deviation between seeds, or the standard error of one value over n test images."""
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.sqrt(mean * (1 - mean) / n)
    return f"{100 * mean:.1f} ± {100 * spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", type=Path, help="[the shipped ones that the data set trained]")
    parser.add_argument("--dataset", choices=SOURCES, default="fashion")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="of the untrained twins")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="records, one a line; what is there is not redone"
    )
    parser.add_argument("--write", type=Path, help="fill the tables of this page, measure nothing")
    given = parser.parse_args()
    done = records_in(given.results)
    if given.write:
        for dataset in dict.fromkeys(record["dataset"] for record in done):
            begin, end = (mark.format(dataset) for mark in MARKS)
            write_between(given.write, begin, end, table([r for r in done if r["dataset"] == dataset]))
        return
    shipped = [*sorted(PRETRAINED.iterdir()), COLLAPSED]
    shipped = [folder for folder in shipped if load(folder).card.training["data"] == given.dataset]
    train, test = load_data(given.dataset, given.data)
    assert isinstance(train, ImageSet)
    assert isinstance(test, ImageSet)
    known = {(r["dataset"], r["name"], r["kind"], r["seed"]) for r in done}
    for key, measure in plan(given.encoders or shipped, train, test, given.seeds):
        if (given.dataset, *key) in known:
            continue
        record = dict(zip(("dataset", "name", "kind", "seed"), (given.dataset, *key), strict=True)) | measure()
        with given.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    print(table([r for r in map(json.loads, given.results.read_text().splitlines()) if r["dataset"] == given.dataset]))


if __name__ == "__main__":
    main()
