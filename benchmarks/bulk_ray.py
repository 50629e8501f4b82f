"""Bulk embedding on a Ray cluster of this machine beside a local run with as many processes.

    python -m benchmarks.bulk_ray --images 4096 --processes 2 --rounds 3

Both embed the same files into empty folders, in turns. Starting the processes is part of both, starting Ray is not. CPU
seconds are those of the processes that embed, and of the one that gives them work. The ratio is the median over rounds:
of wall time, which needs a quiet machine, and of CPU seconds.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bulk import photographs, show
from scale import bulk, ray_bulk, sources
from scale.sources import Shard
from service.settings import PRETRAINED


class Timed(ray_bulk.Embedder):
    """An actor that says what it took."""

    def cpu(self) -> float:
        """CPU seconds since its process started."""
        return time.process_time()


def raise_it(reason: str) -> None:
    """A shard that cannot be read ends the benchmark."""
    raise RuntimeError(reason)


def locally(shards: list[Shard], encoder: Path, processes: int) -> tuple[float, float]:
    """Wall and CPU seconds of a local run."""
    with tempfile.TemporaryDirectory() as out:
        left = bulk.begin(Path(out), encoder, shards)
        started = time.monotonic()
        own = time.process_time()
        before = _children()
        bulk.run_local(left, encoder, Path(out), processes=processes, failed=raise_it)
        return time.monotonic() - started, time.process_time() - own + _children() - before


def on_ray(ray: Any, shards: list[Shard], encoder: Path, processes: int) -> tuple[float, float]:
    """Wall and CPU seconds on the cluster."""
    with tempfile.TemporaryDirectory() as out:
        left = bulk.begin(Path(out), encoder, shards)
        started = time.monotonic()
        own = time.process_time()
        actor = ray.remote(num_cpus=1)(Timed)
        arguments = str(encoder.resolve()), out, "cpu", "auto", ray_bulk.identity_of(Path(out))
        actors = [actor.remote(*arguments) for _ in range(processes)]
        ray_bulk.Crew(ray, actors, lambda written: None, raise_it).embed(left)
        wall = time.monotonic() - started
        cpu = time.process_time() - own + sum(ray.get([it.cpu.remote() for it in actors]))
        for it in actors:
            ray.kill(it)
        return wall, cpu


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print rates and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=PRETRAINED / "fashion-directclr")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--shard", type=int, default=256, help="images in a shard")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, pixels")
    # One process would be this one, whose start is no part of the run.
    parser.add_argument("--processes", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sources.FILES_A_SHARD = options.shard
    taken: dict[str, list[tuple[float, float]]] = {"local": [], "Ray": []}
    with tempfile.TemporaryDirectory() as folder, ray_bulk.connected("local") as ray:
        photographs(Path(folder), options.images, options.side)
        shards = sources.shards(folder)
        for _ in range(options.rounds):
            taken["local"].append(locally(shards, options.encoder, options.processes))
            taken["Ray"].append(on_ray(ray, shards, options.encoder, options.processes))
    print(
        f"{options.images} JPEG files of {options.side} x {options.side}, {options.processes} processes of one thread"
    )
    show(taken, options.images, "Ray, of local", 0.85)


if __name__ == "__main__":
    main()
