"""What small changes of a model cost a search through an index of old embeddings, beside the canary's angle.

    python -m benchmarks.small_changes --encoder models/pretrained/fashion-directclr --out changes.jsonl
    python -m benchmarks.small_changes --table benchmarks/small_changes.jsonl --write docs/measured/small-changes.md

Rounded weights, noise, drifts of the answers and slightly wrong pixels, each at several strengths. 10,000 training
images embedded before the change are the index, test images embedded after it the queries: points of 20-nearest
accuracy lost, with the 95 % interval of the paired difference, and the share of each query's ten nearest that are still
found. "Measurable" is a loss whose interval lies above 0.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._page import write_between
from benchmarks.detection.__main__ import images_of
from benchmarks.detection.cases import Bench, damaged, noisy, quantised, rounded
from benchmarks.neighbour_points import crossing
from fullrank.canary import CanaryReader
from fullrank.neighbours import nearest, overlap, squared_distances
from fullrank.thresholds import CANARY_ANGLE_MOST, canary_angle
from models.artifact import load
from models.backbones import Encoder
from models.embedder import Embedder
from models.embedder import normalize as unit
from training.evaluate import nearest_classes

BANK, FOUND = 10_000, 10
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Record:
    """One change: points lost and the half-width of their interval, shares of neighbours found in the index and among
    the canary, the canary's angles in degrees, and the threshold of the largest."""

    encoder: str
    change: str
    queries: int
    lost: float
    half: float
    recall: float
    across: float
    kept: float
    angle: float
    median: float
    limit: float


def changes(bench: Bench) -> Iterator[tuple[str, Change, bool]]:
    """Name, change, and whether it maps rows to rows and not images to rows."""
    artifact, generator, d = bench.artifact, bench.generator, bench.dimension
    basis, mean = bench.reference.basis.float(), bench.reference.mean.float()
    embed = bench.embedder.embed

    yield "bfloat16", Embedder(artifact, dtype=torch.bfloat16).embed, False
    weights: dict[str, Callable[[Encoder], None]] = {
        f"{bits}-bit weights": quantised(bits) for bits in (10, 9, 8, 7, 6, 5, 4)
    }
    weights |= {"e4m3 weights": rounded(torch.float8_e4m3fn), "e5m2 weights": rounded(torch.float8_e5m2)}
    weights |= {f"{share:.0%} noise in weights": noisy(share, generator) for share in (0.02, 0.05, 0.1, 0.2)}
    for name, damage in weights.items():
        yield name, damaged(artifact, damage).embed, False
    for share in (0.02, 0.05, 0.1):
        yield f"units scaled {share:.0%} off", times((share * torch.randn(d, generator=generator)).exp()), True
    for name, axis, strengths in (("", 0, (0.02, 0.05, 0.1, 0.2, 0.5)), (", trailing", d // 4, (0.02, 0.05, 0.1))):
        for by in strengths:
            yield f"mean shifted by {by}{name}", plus(by * basis[:, axis]), True
    for by in (0.02, 0.05, 0.1):
        yield f"noise of length {by}", jittered(by, generator), True
    yield "e4m3 answers", lambda rows: rows.to(torch.float8_e4m3fn).float(), True
    for k in (d // 2, d // 4):
        yield f"principal rank {k}", projected(mean, basis[:, :k]), True
    for share in (0.05, 0.02):
        units = torch.ones(d)
        units[torch.randperm(d, generator=generator)[: int(share * d)]] = 0
        yield f"{share:.0%} of units dead", times(units), True
    pixels = {f"gamma {g}": gamma(g) for g in (1.05, 1.1, 1.2)}
    pixels |= {f"brighter by {by}": plus(by) for by in (2, 5, 10)}
    pixels |= {f"pixel noise {sigma}": grainy(sigma, generator) for sigma in (1, 2, 4)}
    pixels |= {f"{bits} bits a pixel": coarse(bits) for bits in (5, 4)}
    for name, change in pixels.items():
        yield name, shown(change, embed), False


def times(factor: Tensor) -> Change:
    """Rows times a factor for each unit (d,)."""
    return lambda rows: rows * factor


def plus(shift: Tensor | int) -> Change:
    """Rows or pixels moved by so much."""
    return lambda rows: (rows.int() if isinstance(shift, int) else rows) + shift


def jittered(length: float, generator: torch.Generator) -> Change:
    """Rows and noise of this length."""
    return lambda rows: rows + length * unit(torch.randn(rows.shape, generator=generator))


def projected(mean: Tensor, frame: Tensor) -> Change:
    """Rows projected about the mean onto orthonormal columns (d, k)."""
    return lambda rows: (rows - mean) @ frame @ frame.T + mean


def gamma(exponent: float) -> Change:
    """Pixels to a power."""
    return lambda images: (255 * (images / 255) ** exponent).round()


def grainy(sigma: int, generator: torch.Generator) -> Change:
    """Pixels and noise."""
    return lambda images: (images + sigma * torch.randn(images.shape, generator=generator)).round()


def coarse(bits: int) -> Change:
    """Pixels of fewer bits."""
    return lambda images: (images >> (8 - bits)) << (8 - bits)


def shown(change: Change, embed: Change) -> Change:
    """What the intact model makes of changed pixels."""
    return lambda images: embed(change(images).clamp(0, 255).to(torch.uint8))


def search(bank: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) the class that each query's nearest of the bank name, and (n, 10) the nearest."""
    named, found = zip(*nearest_classes(bank, labels, queries), strict=True)
    return torch.cat(named), torch.cat(found)[:, :FOUND]


def measured(folder: Path, count: int) -> Iterator[Record]:
    """What each change costs an encoder, by the last so many test images as queries."""
    artifact = load(folder)
    bank, queries = (
        images_of(artifact, "bank").take(slice(0, BANK)),
        images_of(artifact, "test").take(slice(-count, None)),
    )
    bench = Bench(artifact, queries.images, queries.labels)
    index, near, reader = bench.embed(bank.images), nearest(squared_distances(bench.canary)), CanaryReader(bench.canary)
    named, found = search(index, bank.labels, bench.clean)
    right = (named == queries.labels).double()
    for name, change, of_rows in changes(bench):
        asked, seen = (bench.clean, bench.canary) if of_rows else (queries.images, bench.canary_images)
        rows, canary = unit(change(asked)), unit(change(seen))
        named, now = search(index, bank.labels, rows)
        lost = right - (named == queries.labels).double()
        read = reader.read(canary)
        yield Record(
            artifact.card.name,
            name,
            count,
            100 * float(lost.mean()),
            196 * float(lost.std()) / math.sqrt(count),
            overlap(found, now),
            crossing(bench.canary, canary, near),
            read.neighbours_overlap,
            read.angle_degrees,
            read.angle_median_degrees,
            canary_angle(bench.reference),
        )


def lines(records: list[Record]) -> Iterator[str]:
    """The tables: losses below and above the threshold, and each change."""
    encoders = list(dict.fromkeys(it.encoder for it in records))
    yield (
        "| encoder | threshold | canary turned | changes | measurable losses | most points lost |" + "\n|" + "---|" * 6
    )
    for encoder in encoders:
        mine = [it for it in records if it.encoder == encoder]
        limit = mine[0].limit
        parts = {
            "less": [it for it in mine if it.angle <= limit],
            f"more, to {CANARY_ANGLE_MOST:.1f} degrees": [it for it in mine if limit < it.angle <= CANARY_ANGLE_MOST],
            "further": [it for it in mine if it.angle > CANARY_ANGLE_MOST],
        }
        for words, part in parts.items():
            if part:
                worst = max(part, key=lambda it: it.lost)
                hurt = sum(it.lost > it.half for it in part)
                said = f"{worst.lost:.2f} ± {worst.half:.2f} ({worst.change})"
                yield f"| `{encoder}` | {limit:.1f} degrees | {words} | {len(part)} | {hurt} | {said} |"
    yield "\nEach change: largest angle of a canary image; points lost; share of the ten nearest still found.\n"
    yield "| change | " + " | ".join(f"`{it}`" for it in encoders) + " |\n|---" + "|---" * len(encoders) + "|"
    by = {(it.change, it.encoder): it for it in records}
    for change in dict.fromkeys(it.change for it in records):
        cells = []
        for encoder in encoders:
            it = by.get((change, encoder))
            told = "–" if it is None else f"{it.angle:.1f}°; {it.lost:.2f} ± {it.half:.2f}; {it.recall:.1%}"
            cells.append(f"**{told}**" if it is not None and it.lost > it.half else told)
        yield f"| {change} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure an encoder's changes, or make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="append a line of JSON a change")
    parser.add_argument("--table", type=Path, help="make the tables of these lines")
    parser.add_argument("--write", type=Path, help="put them between the marks in this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.encoder:
        for record in measured(options.encoder, options.queries):
            print(json.dumps(asdict(record)), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
    if options.table:
        text = "\n".join(lines([Record(**json.loads(line)) for line in options.table.read_text().splitlines()]))
        print(text)
        if options.write:
            write_between(options.write, "<!-- changes: start -->", "<!-- changes: end -->", text)


if __name__ == "__main__":
    main()
