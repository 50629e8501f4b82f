"""Bulk embedding beside the bare loop: decode and embed in batches, on all cores, and write nothing.

    python -m benchmarks.bulk --rounds 3

Both read the same files, with the same engine, and start their processes alike. Files are divided evenly, so that no
core waits for another at the end. The two take turns; the ratio is the median over rounds: of wall time, which needs a
quiet machine, and of CPU seconds. What happens once in a process (importing, loading the encoder, the first batch and
what the first shard needs) is measured apart, as start-up: a bulk run is long. The last column says what it makes of a
run as short as this one. Each file is read `--times` times over, so that a run is longer than its set of files.

Two encoders are measured: the smallest that comes with the package, where all that is not the encoder counts most, and
a ResNet-18 of 224 x 224 pixels with random weights, on a sixteenth of the files.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.serving.workload import random_encoder
from models.artifact import Architecture, load, save
from models.embedder import Embedder
from models.preprocess import decode
from scale import bulk, sources
from scale.sources import Shard
from service.settings import PRETRAINED

Share = tuple[list[Shard], str, str, str]
SHARE = 16  # the large encoder gets one file in so many


@dataclass(frozen=True)
class Taken:
    """What one run took, in seconds: wall time, CPU time of all processes, and CPU time of their start-up."""

    wall: float
    cpu: float
    start: float


def photographs(folder: Path, count: int, side: int) -> list[str]:
    """Write JPEG files of smooth random fields, which compress as photographs do. Returns their names."""
    for index in range(count):
        coarse = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        (folder / f"{index:06d}.jpg").write_bytes(buffer.getvalue())
    return sorted(map(str, folder.iterdir()))


def bare(share: Share) -> Iterator[None]:
    """Read, decode and embed; the bare loop."""
    shards, encoder, _, engine = share
    preprocessing = (artifact := load(Path(encoder))).card.preprocessing
    embedder = Embedder(artifact, max_batch=bulk.BATCH, engine=engine, threads=1)  # type: ignore[arg-type]
    files = [name for shard in shards for name in shard.paths]

    def embed(names: list[str]) -> None:
        images = [Path(name).read_bytes() for name in names]
        embedder.embed(np.stack([decode(image, preprocessing) for image in images]))

    embed(files[: bulk.BATCH])
    yield
    for start in range(0, len(files), bulk.BATCH):
        embed(files[start : start + bulk.BATCH])


def written(share: Share) -> Iterator[None]:
    """What each process of `fullrank embed` does."""
    shards, encoder, out, engine = share
    embedding = bulk.Embedding(encoder, out, engine=engine)
    first = shards[0]
    embedding(Shard(f"first-{first.name}", first.kind, first.paths[: bulk.BATCH], first.root))
    yield
    for shard in shards:
        embedding(shard)


WORK: dict[str, Callable[[Share], Iterator[None]]] = {"bare": bare, "bulk": written}
Result = tuple[float, float, float, float]


def timed(name: str, share: Share, ready: Barrier, results: "multiprocessing.Queue[Result | str]") -> None:
    """Prepare, wait for the others, work; report start, end and CPU seconds of the work, and CPU seconds before it.

    What went wrong is reported in words.
    """
    torch.set_num_threads(1)
    steps = WORK[name](share)
    try:
        next(steps)
        ready.wait()
        started, cpu = time.monotonic(), time.process_time()
        next(steps, None)
        results.put((started, time.monotonic(), time.process_time() - cpu, cpu))
    except Exception as error:
        ready.abort()
        results.put(f"{name}: {type(error).__name__}: {error}")


def run(name: str, shards: list[Shard], encoder: str, engine: str, processes: int) -> Taken:
    """One run of all processes together."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes)
    results: multiprocessing.Queue[Result | str] = context.Queue()
    with tempfile.TemporaryDirectory() as out:
        bulk.begin(Path(out), Path(encoder), shards)
        shares = [(shards[index::processes], encoder, out, engine) for index in range(processes)]
        crew = [context.Process(target=timed, args=(name, share, ready, results)) for share in shares]
        for process in crew:
            process.start()
        found = [results.get() for _ in crew]
        for process in crew:
            process.join()
    if wrong := [it for it in found if isinstance(it, str)]:
        raise SystemExit("\n".join(wrong))
    starts, ends, cpu, before = zip(*(it for it in found if not isinstance(it, str)), strict=True)
    return Taken(max(ends) - min(starts), sum(cpu), sum(before))


def show(taken: dict[str, list[Taken]], total: int, title: str, goal: float) -> None:
    """Print the rates of two ways to embed `total` images, by name with each round's figures, and the share of the
    first's that the second reaches."""
    print("| | images/s, wall | CPU an image, ms | CPU of all start-ups, s |\n|---|---|---|---|")
    for name, rounds in taken.items():
        wall, cpu, start = (statistics.median(getattr(it, of) for it in rounds) for of in ("wall", "cpu", "start"))
        print(f"| {name} | {total / wall:.1f} | {1000 * cpu / total:.3f} | {start:.2f} |")
    pairs = list(zip(*taken.values(), strict=True))
    wall = statistics.median(first.wall / second.wall for first, second in pairs)
    cpu = statistics.median(first.cpu / second.cpu for first, second in pairs)
    whole = statistics.median((first.cpu + first.start) / (second.cpu + second.start) for first, second in pairs)
    print(f"\n{title}: {wall:.3f} by wall time, {cpu:.3f} by CPU (goal {goal}); {whole:.3f} by CPU with start-up\n")


def compare(files: list[str], encoder: str, options: argparse.Namespace) -> None:
    """Measure one encoder on these files and print the result."""
    total = len(files) * options.times
    if total < options.processes:
        raise SystemExit(f"{total} images are too few for {options.processes} processes")
    per_shard = min(options.shard, total // options.processes, len(files))  # no file twice in a shard
    listed = [name for _ in range(options.times) for name in files]
    shards = [
        Shard(f"part-{start:08d}", "files", tuple(listed[start : start + per_shard]))
        for start in range(0, total, per_shard)
    ]
    taken: dict[str, list[Taken]] = {name: [] for name in WORK}
    for _ in range(options.rounds):
        for name, rounds in taken.items():
            rounds.append(run(name, shards, encoder, options.engine, options.processes))
    print(f"{load(Path(encoder)).card.name}: {len(files)} files, {options.times} times, {options.processes} processes")
    show(taken, total, "bulk, of the bare loop", 0.95)


def main() -> None:
    """Print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="measure this one alone")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--files", type=Path, help="a folder of image files to read, in place of made ones")
    parser.add_argument("--images", type=int, default=1024, help="files for each process")
    parser.add_argument("--times", type=int, default=4, help="how often each file is read")
    parser.add_argument("--shard", type=int, default=sources.FILES_A_SHARD, help="images in a shard")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files that are made, pixels")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    wanted = options.images * options.processes
    with tempfile.TemporaryDirectory() as folder:
        if options.files is None:
            files = photographs(Path(folder), wanted, options.side)
        else:
            files = [name for shard in sources.shards(str(options.files)) for name in shard.paths][:wanted]
        print(f"{len(files)} JPEG files, each process has one thread, {options.shard} images a shard\n")
        if options.encoder is not None:
            compare(files, options.encoder, options)
            return
        compare(files, str(PRETRAINED / "fashion-directclr"), options)
        with tempfile.TemporaryDirectory() as encoder:
            save(random_encoder("resnet18-224", Architecture(name="resnet18"), 224), Path(encoder) / "resnet18-224")
            few = files[: max(options.processes, len(files) // SHARE)]
            compare(few, f"{encoder}/resnet18-224", options)


if __name__ == "__main__":
    main()
