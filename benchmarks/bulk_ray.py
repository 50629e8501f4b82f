"""Bulk embedding on a Ray cluster of this machine beside a local run with as many processes.

    python -m benchmarks.bulk_ray --rounds 3

Both embed the same files into empty folders, in turns, each twice: a few images, then all of them. The difference is
what the images take; the short run is mostly start-up (processes, imports, the encoder). Starting the cluster is left
out. CPU seconds of Ray are those of this process and of all processes of the cluster, also those that only manage it.
The ratio is the median over rounds: of wall time, which needs a quiet machine, and of CPU seconds.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.bulk import Taken, photographs, show
from scale import bulk, ray_bulk
from scale.sources import FILES_A_SHARD, Shard
from service.settings import PRETRAINED

FEW = bulk.BATCH  # images of each process in the short run
Embed = Callable[[list[Shard], Path, Path, int], float]


def raise_it(reason: str) -> None:
    """A shard that cannot be read ends the benchmark."""
    raise RuntimeError(reason)


def locally(left: list[Shard], encoder: Path, out: Path, processes: int) -> float:
    """Embed in processes of this machine. Returns CPU seconds."""
    before = _of_children()
    own = time.process_time()
    bulk.run_local(left, encoder, out, processes=processes, failed=raise_it)
    return time.process_time() - own + _of_children() - before


def on_ray(ray: Any) -> Embed:
    """Embed in actors of the cluster."""

    def embed(left: list[Shard], encoder: Path, out: Path, processes: int) -> float:
        before = _of_descendants()
        own = time.process_time()
        actor = ray.remote(num_cpus=1)(ray_bulk.Embedder)
        arguments = str(encoder.resolve()), str(out), "cpu", "auto", ray_bulk.identity_of(out)
        actors = [actor.remote(*arguments) for _ in range(processes)]
        ray_bulk.Crew(ray, actors, lambda written: None, raise_it).embed(left)
        after = _of_descendants()
        for it in actors:
            ray.kill(it)
        return time.process_time() - own + sum(cpu - before.get(pid, 0.0) for pid, cpu in after.items())

    return embed


def measured(embed: Embed, shards: list[Shard], encoder: Path, processes: int) -> tuple[float, float]:
    """Wall and CPU seconds of one run into an empty folder."""
    with tempfile.TemporaryDirectory() as out:
        left = bulk.begin(Path(out), encoder, shards)
        started = time.monotonic()
        cpu = embed(left, encoder, Path(out), processes)
        return time.monotonic() - started, cpu


def taken(embed: Embed, files: list[str], options: argparse.Namespace) -> Taken:
    """What all images take beyond a few of them, and the CPU seconds of the run of a few."""
    few = [Shard(f"few-{at}", "files", tuple(files[at : at + FEW])) for at in range(0, FEW * options.processes, FEW)]
    listed = files * options.times
    starts = range(0, len(listed), options.shard)
    shards = [Shard(f"part-{at:08d}", "files", tuple(listed[at : at + options.shard])) for at in starts]
    short_wall, short = measured(embed, few, options.encoder, options.processes)
    wall, cpu = measured(embed, [*few, *shards], options.encoder, options.processes)
    return Taken(wall - short_wall, cpu - short, short)


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _of_descendants() -> dict[int, float]:
    """CPU seconds of each process that was started from this one and runs, by Linux's /proc."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text().rpartition(") ")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            seconds[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return {pid: cpu for pid, cpu in seconds.items() if below(pid)}


def main() -> None:
    """Print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=PRETRAINED / "fashion-directclr")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--times", type=int, default=6, help="how often each file is read")
    parser.add_argument("--shard", type=int, default=FILES_A_SHARD, help="images in a shard")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, pixels")
    # One process would be this one, whose start is no part of the run.
    parser.add_argument("--processes", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_bulk.connected("local") as ray:
        files = photographs(Path(folder), options.images, options.side)
        ways: dict[str, Embed] = {"local": locally, "Ray": on_ray(ray)}
        found: dict[str, list[Taken]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, embed in ways.items():
                found[name].append(taken(embed, files, options))
    print(f"{len(files)} JPEG files, {options.times} times, {options.processes} processes of one thread")
    show(found, len(files) * options.times, "Ray, of local", 0.85)


if __name__ == "__main__":
    main()
