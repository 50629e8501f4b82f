"""Can the canary say how many points of nearest-neighbour accuracy a fault costs? Graded faults on several encoders.

    python -m benchmarks.neighbour_points --encoder models/pretrained/fashion-directclr --out faults.jsonl
    python -m benchmarks.neighbour_points --encoder models/pretrained/fashion-byol --out faults.jsonl
    python -m benchmarks.neighbour_points --encoder models/pretrained/cifar10-directclr --out faults.jsonl
    python -m benchmarks.neighbour_points --table faults.jsonl --write docs/measured/neighbour-points.md

Each fault is applied to 1,000 test images (queries) and to the reference's canary images. Two losses are measured, in
points of 20-nearest-neighbour accuracy: of an index of 1,000 test images that was filled before the fault ("old
index"), and of an index filled after it ("new index": each query among the other queries). The canary's measures are
those that the service has, and the overlap of neighbours across the fault: of a canary image's 10 nearest stored
embeddings, how many are those of its stored embedding. For each measure an increasing curve of loss is fitted to all
encoders but one and judged on that one.

Decided before the first run: the sentence "about N points" is worth saying if nine in ten losses of an encoder that the
curve has not seen lie within 3 points of it.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from benchmarks._page import write_between
from benchmarks.detection.cases import damaged, noisy
from benchmarks.detection.preprocessing import jpeg
from fullrank.canary import CanaryReader
from fullrank.neighbours import NEIGHBOURS, nearest, overlap, squared_distances
from models.artifact import Artifact, load
from models.embedder import Embedder, normalize
from training.data import SOURCES, ImageSet
from training.evaluate import knn_accuracy

BANK, QUERIES, CLOSE = 1000, 1000, 3.0
MEASURES = {
    "neighbours_overlap": "canary neighbours that stay",
    "across": "the same, across the fault",
    "distance_correlation": "correlation of distances",
    "angle_median_degrees": "middle angle",
}
LOSSES = {"old": "old index", "new": "new index"}
Change = Callable[[Tensor], Tensor]
Faulty = Callable[[Tensor], Tensor]


def rows_faults(d: int, basis: Tensor, mean: Tensor, usual: float, generator: torch.Generator) -> dict[str, Change]:
    """Faults of what the encoder gives, (n, d) -> (n, d). basis, mean: the reference's; usual: deviation of a unit."""
    order = torch.randperm(d, generator=generator)
    turned = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q

    def dead(share: float) -> Change:
        alive = torch.ones(d)
        alive[order[: int(share * d)]] = 0
        return lambda rows: rows * alive

    def project(frame: Tensor) -> Change:
        return lambda rows: rows @ frame @ frame.T

    def noise(times: float) -> Change:
        return lambda rows: rows + times * usual * torch.randn(rows.shape, generator=generator)

    def shifted(by: float) -> Change:
        return lambda rows: rows + by * basis[:, 0]

    def handed_on(share: float) -> Change:
        return lambda rows: torch.where(torch.rand(len(rows), 1, generator=generator) < share, rows.roll(1, 0), rows)

    return {
        **{f"{share:.0%} of units dead": dead(share) for share in (0.25, 0.5, 0.75, 0.9, 0.97)},
        **{f"principal rank {k}": project(basis[:, :k]) for k in (64, 32, 16, 8, 4, 2)},
        **{f"random rank {k}": project(turned[:, :k]) for k in (64, 16, 4)},
        **{f"noise of {times} deviations": noise(times) for times in (0.25, 0.5, 1.0, 2.0)},
        **{f"mean shifted by {by}": shifted(by) for by in (0.5, 2.0)},
        **{f"{share:.0%} of answers are the next one's": handed_on(share) for share in (0.05, 0.2, 0.5)},
        "sign alone": lambda rows: (rows - mean).sign(),
    }


def image_faults(generator: torch.Generator) -> dict[str, Change]:
    """Faults of the pixels, (n, c, s, s) uint8."""

    def gamma(g: float) -> Change:
        return lambda images: (255 * (images / 255) ** g).round().to(torch.uint8)

    def coarse(bits: int) -> Change:
        return lambda images: (images >> (8 - bits)) * (255 // (2**bits - 1))

    def noise(sigma: float) -> Change:
        def change(images: Tensor) -> Tensor:
            return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)

        return change

    def smaller(factor: int) -> Change:
        def change(images: Tensor) -> Tensor:
            means = F.avg_pool2d(images.float(), factor)
            return F.interpolate(means, images.shape[-2:], mode="bilinear").to(torch.uint8)

        return change

    return {
        **{f"gamma {g}": gamma(g) for g in (1.5, 2.2, 3.5)},
        **{f"{bits} bits a pixel": coarse(bits) for bits in (2, 1)},
        **{f"pixel noise {sigma}": noise(sigma) for sigma in (16, 48)},
        **{f"side divided by {factor}": smaller(factor) for factor in (2, 3)},
        "JPEG of quality 8": jpeg,
    }


def faults_of(artifact: Artifact, rows: Tensor) -> Iterator[tuple[str, Faulty | Change, bool]]:
    """Name, change, and whether it maps images to rows (n, d) and not rows to rows. rows: healthy ones."""
    assert artifact.reference is not None
    reference, generator = artifact.reference, torch.Generator().manual_seed(0)
    usual = float(rows.std(0).square().mean().sqrt())
    basis, mean = reference.basis.float(), reference.mean.float()
    for name, change in rows_faults(rows.shape[1], basis, mean, usual, generator).items():
        yield name, change, False
    embedder = Embedder(artifact)
    for name, change in image_faults(generator).items():
        yield name, lambda images, change=change: embedder.embed(change(images)), True
    for share in (0.1, 0.2, 0.4):
        yield f"{share:.0%} noise in weights", damaged(artifact, noisy(share, generator)).embed, True


def measured(folder: Path, data: Path | None) -> Iterator[dict[str, Any]]:
    """A record for each fault of an encoder: what the canary says, and the losses in points."""
    artifact = load(folder)
    assert artifact.canary is not None
    name = str(artifact.card.training["data"])
    source = SOURCES[name]
    test = source.read(data or source.default, "test")
    assert isinstance(test, ImageSet)
    embedder, canary = Embedder(artifact), artifact.canary.images
    images, labels = test.images[: BANK + QUERIES], test.labels[: BANK + QUERIES]
    clean, stored = normalize(embedder.embed(images)), normalize(embedder.embed(canary))
    bank, queries, truth = clean[:BANK], clean[BANK:], labels[BANK:]
    reader, near = CanaryReader(stored), nearest(squared_distances(stored))
    healthy = {"old": knn_accuracy(bank, labels[:BANK], queries, truth), "new": among(queries, truth)}
    for fault, change, whole in faults_of(artifact, queries):
        rows, now = (normalize(change(it)) for it in ((images[BANK:], canary) if whole else (queries, stored)))
        found = reader.read(now)
        record = {"encoder": artifact.card.name, "fault": fault, "across": crossing(stored, now, near)}
        record |= {it: getattr(found, it) for it in MEASURES if it != "across"}
        record["old"] = 100 * (healthy["old"] - knn_accuracy(bank, labels[:BANK], rows, truth))
        record["new"] = 100 * (healthy["new"] - among(rows, truth))
        yield record | {"healthy": healthy}


def among(rows: Tensor, labels: Tensor) -> float:
    """Nearest-neighbour accuracy of each of the rows among the others: in two halves, each the other's index."""
    half = len(rows) // 2
    first, second = (rows[:half], labels[:half]), (rows[half:], labels[half:])
    return (knn_accuracy(*first, *second) + knn_accuracy(*second, *first)) / 2


def crossing(stored: Tensor, now: Tensor, near: Tensor) -> float:
    """Of each row's nearest stored rows, itself apart, the share that its stored row has too."""
    squares = (2 - 2 * now.double() @ stored.double().T).fill_diagonal_(math.inf)
    return overlap(near, nearest(squares, NEIGHBOURS))


def errors(records: list[dict[str, Any]], measure: str, loss: str) -> dict[str, Tensor]:
    """Encoder -> loss less the prediction of a curve fitted to the other encoders, one a fault."""
    found = {}
    for left_out in dict.fromkeys(it["encoder"] for it in records):
        known = sorted((severity(it, measure), it[loss]) for it in records if it["encoder"] != left_out)
        x, y = torch.tensor(known, dtype=torch.float64).T.contiguous()
        curve = torch.from_numpy(isotonic_regression(y.numpy()).x)
        judged = [it for it in records if it["encoder"] == left_out]
        at = torch.tensor([severity(it, measure) for it in judged], dtype=torch.float64)
        predicted = curve[torch.searchsorted(x, at).clamp(max=len(x) - 1)]
        found[left_out] = torch.tensor([it[loss] for it in judged], dtype=torch.float64) - predicted
    return found


def severity(record: dict[str, Any], measure: str) -> float:
    """A measure as a number that grows with the fault."""
    return float(record[measure]) * (1 if measure == "angle_median_degrees" else -1)


def lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """The tables."""
    encoders = list(dict.fromkeys(it["encoder"] for it in records))
    yield "| measure | loss of | " + " | ".join(f"error on `{it}`, 9 in 10 within" for it in encoders) + " | holds |"
    yield "|---|---|" + "---|" * (len(encoders) + 1)
    for measure, words in MEASURES.items():
        for loss, of in LOSSES.items():
            parts = errors(records, measure, loss)
            within = [float(parts[it].abs().quantile(0.9)) for it in encoders]
            holds = "yes" if max(within) <= CLOSE else "no"
            yield f"| {words} | {of} | " + " | ".join(f"{it:.1f} points" for it in within) + f" | {holds} |"
    yield f"\nWhat faults cost at one and the same overlap of the canary's neighbours ({len(records)} faults):\n"
    yield "| neighbours that stay | faults | cost least, new index | cost most, new index |\n|---|---|---|---|"
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        there = [it for it in records if low <= it["neighbours_overlap"] < low + 0.2 + (low == 0.8)]
        if there:
            least, most = (choose(there, key=lambda it: it["new"]) for choose in (min, max))
            ends = (f"{it['new']:.1f} ({it['fault']}, `{it['encoder']}`)" for it in (least, most))
            yield f"| {low:.0%} to {low + 0.2:.0%} | {len(there)} | " + " | ".join(ends) + " |"
    yield "\nEvery fault: neighbours that stay, points lost by an old index, points lost by a new one.\n"
    yield "| fault | " + " | ".join(f"`{it}`" for it in encoders) + " |\n|---" + "|---" * len(encoders) + "|"
    by = {(it["fault"], it["encoder"]): it for it in records}
    for fault in dict.fromkeys(it["fault"] for it in records):
        cells = []
        for encoder in encoders:
            it = by.get((fault, encoder))
            cells.append("–" if it is None else f"{it['neighbours_overlap']:.0%}, {it['old']:.1f}, {it['new']:.1f}")
        yield f"| {fault} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure an encoder's faults, or make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--data", type=Path, help="folder of the data set, if not its usual one")
    parser.add_argument("--out", type=Path, help="append a line of JSON a fault")
    parser.add_argument("--table", type=Path, help="make the tables of these lines")
    parser.add_argument("--write", type=Path, help="put them between the marks in this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.encoder:
        for record in measured(options.encoder, options.data):
            print(json.dumps(record), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    if options.table:
        text = "\n".join(lines([json.loads(line) for line in options.table.read_text().splitlines()]))
        print(text)
        if options.write:
            write_between(options.write, "<!-- points: start -->", "<!-- points: end -->", text)


if __name__ == "__main__":
    main()
