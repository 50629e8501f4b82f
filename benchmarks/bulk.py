"""Bulk embedding beside the bare loop: decode and embed in batches, on all cores, and write nothing.

    python -m benchmarks.bulk --images 2048 --processes 2 --rounds 3

Both read the same files, with the same engine, and start their processes alike. Files are divided evenly, so that no
core waits for another at the end. The two take turns; the ratio is the median over rounds: of wall time, which needs a
quiet machine, and of CPU seconds. Starting the processes (importing, loading the encoder) is left out of both.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.artifact import load
from models.embedder import Embedder
from models.preprocess import Preprocessing, decode
from scale import bulk, sources
from scale.sources import Shard
from service.settings import PRETRAINED

Share = tuple[list[Shard], str, str, str]


def photographs(folder: Path, count: int, side: int) -> None:
    """Write JPEG files of smooth random fields, which compress as photographs do."""
    for index in range(count):
        coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        (folder / f"{index:06d}.jpg").write_bytes(buffer.getvalue())


def bare(share: Share) -> Iterator[None]:
    """Read, decode and embed; the bare loop."""
    shards, encoder, _, engine = share
    artifact = load(Path(encoder))
    embedder = Embedder(artifact, max_batch=bulk.BATCH, engine=engine, threads=1)  # type: ignore[arg-type]
    embedder.embed(np.zeros((1, *_shape(artifact.card.preprocessing)), np.uint8))
    yield
    files = [name for shard in shards for name in shard.paths]
    for start in range(0, len(files), bulk.BATCH):
        images = [Path(name).read_bytes() for name in files[start : start + bulk.BATCH]]
        embedder.embed(np.stack([decode(image, artifact.card.preprocessing) for image in images]))


def written(share: Share) -> Iterator[None]:
    """What each process of `fullrank embed` does."""
    shards, encoder, out, engine = share
    embedding = bulk.Embedding(encoder, out, engine=engine)
    embedding.embedder.embed(np.zeros((1, *_shape(embedding.artifact.card.preprocessing)), np.uint8))
    yield
    for shard in shards:
        embedding(shard)


def _shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    return preprocessing.channels, preprocessing.size, preprocessing.size


WORK: dict[str, Callable[[Share], Iterator[None]]] = {"bare": bare, "bulk": written}


def timed(
    name: str, share: Share, ready: Barrier, results: "multiprocessing.Queue[tuple[float, float, float]]"
) -> None:
    """Prepare, wait for the others, work, and report start, end and CPU seconds of the work."""
    torch.set_num_threads(1)
    steps = WORK[name](share)
    next(steps)
    ready.wait()
    started, cpu = time.monotonic(), time.process_time()
    next(steps, None)
    results.put((started, time.monotonic(), time.process_time() - cpu))


def run(name: str, shards: list[Shard], encoder: str, engine: str, processes: int) -> tuple[float, float]:
    """Wall and CPU seconds of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes)
    results: multiprocessing.Queue[tuple[float, float, float]] = context.Queue()
    with tempfile.TemporaryDirectory() as out:
        bulk.begin(Path(out), Path(encoder), shards)
        shares = [(shards[index::processes], encoder, out, engine) for index in range(processes)]
        crew = [context.Process(target=timed, args=(name, share, ready, results)) for share in shares]
        for process in crew:
            process.start()
        found = [results.get() for _ in crew]
        for process in crew:
            process.join()
    starts, ends, cpu = zip(*found, strict=True)
    return max(ends) - min(starts), sum(cpu)


def show(taken: dict[str, list[tuple[float, float]]], total: int, title: str, goal: float) -> None:
    """Print the rates of two runs of `total` images, by name with their wall and CPU seconds each round, and the share
    of the first's that the second reaches."""
    print("| | images/s, wall | CPU an image, ms |\n|---|---|---|")
    for name, rounds in taken.items():
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {total / wall:.1f} | {1000 * cpu / total:.2f} |")
    pairs = list(zip(*taken.values(), strict=True))
    ratios = [statistics.median(first[it] / second[it] for first, second in pairs) for it in (0, 1)]
    print(f"\n{title}: {ratios[0]:.3f} by wall time, {ratios[1]:.3f} by CPU (goal {goal})")


def main() -> None:
    """Print rates and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=str(PRETRAINED / "fashion-directclr"))
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--images", type=int, default=2048, help="in each process")
    parser.add_argument("--shard", type=int, default=256, help="images in a shard")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, pixels")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sources.FILES_A_SHARD = options.shard
    total = options.images * options.processes
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), total, options.side)
        shards = sources.shards(folder)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WORK}
        for _ in range(options.rounds):
            for name, taken in seconds.items():
                taken.append(run(name, shards, options.encoder, options.engine, options.processes))
    print(f"{total} JPEG files of {options.side} x {options.side}, {options.processes} processes of one thread")
    show(seconds, total, "bulk, of the bare loop", 0.95)


if __name__ == "__main__":
    main()
