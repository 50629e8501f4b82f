"""Bulk embedding on a Ray cluster of this machine beside a local run with as many processes.

    python -m benchmarks.bulk_ray --rounds 3

Both embed the same files into empty folders, in turns, each in two steps: a few images, which is mostly start-up
(processes, imports, the encoder), then the others. Actors are the same in both steps. Between them the cluster is
left alone until it is at rest, because Ray may still start workers that nobody asked for. Processes of a local run
end with it, so that it runs twice: what a run of the few images took is taken away. Starting the cluster is left out.
CPU seconds of Ray are those of this process and of all processes of the cluster, also those that only manage it. The
ratio is the median over rounds: of wall time, which needs a quiet machine, and of CPU seconds.
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

FEW = bulk.BATCH  # images of each process in the first step
REST = 0.15  # of a core: a cluster that uses less has started what it wants to start
Embed = Callable[[list[Shard], list[Shard], Path, int], Taken]


def raise_it(reason: str) -> None:
    """A shard that cannot be read ends the benchmark."""
    raise RuntimeError(reason)


def locally(few: list[Shard], others: list[Shard], encoder: Path, processes: int) -> Taken:
    """Embed in processes of this machine."""

    def measured(shards: list[Shard]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as out:
            left = bulk.begin(Path(out), encoder, shards)
            before = time.process_time() + _of_children()
            started = time.monotonic()
            bulk.run_local(left, encoder, Path(out), processes=processes, failed=raise_it)
            return time.monotonic() - started, time.process_time() + _of_children() - before

    short_wall, short = measured(few)
    wall, cpu = measured([*few, *others])
    return Taken(wall - short_wall, cpu - short, short)


def on_ray(ray: Any) -> Embed:
    """Embed in actors of the cluster."""

    def embed(few: list[Shard], others: list[Shard], encoder: Path, processes: int) -> Taken:
        with tempfile.TemporaryDirectory() as out:
            bulk.begin(Path(out), encoder, [*few, *others])
            used = _Used()
            actor = ray.remote(num_cpus=1)(ray_bulk.Embedder)
            arguments = str(encoder.resolve()), out, "cpu", "auto", ray_bulk.identity_of(Path(out))
            actors = [actor.remote(*arguments) for _ in range(processes)]
            ray.get([it.prepare.remote() for it in actors])
            ray_bulk.Crew(ray, actors, lambda written: None, raise_it).embed(few)
            rest()
            start = used.since()
            started = time.monotonic()
            ray_bulk.Crew(ray, actors, lambda written: None, raise_it).embed(others)
            wall, cpu = time.monotonic() - started, used.since()
            for it in actors:
                ray.kill(it)
        rest()
        return Taken(wall, cpu, start)

    return embed


def rest() -> None:
    """Wait until the cluster is at rest, for a minute at most: on a busy machine it never is for long."""
    used = _Used()
    for _ in range(60):
        time.sleep(1)
        if used.since() < REST:
            return


def taken(embed: Embed, files: list[str], options: argparse.Namespace) -> Taken:
    """What one way to embed takes, for a few images and then for all."""
    few = [Shard(f"few-{at}", "files", tuple(files[at : at + FEW])) for at in range(0, FEW * options.processes, FEW)]
    listed = files * options.times
    per_shard = min(options.shard, len(files))  # no file twice in a shard
    starts = range(0, len(listed), per_shard)
    shards = [Shard(f"part-{at:08d}", "files", tuple(listed[at : at + per_shard])) for at in starts]
    return embed(few, shards, options.encoder, options.processes)


class _Used:
    """CPU seconds of this process and of all that were started from it and still run."""

    def __init__(self) -> None:
        self._own = time.process_time()
        self._of = _of_descendants()

    def since(self) -> float:
        """Those since the last call."""
        own, of = time.process_time(), _of_descendants()
        seconds = own - self._own + sum(cpu - self._of.get(pid, 0.0) for pid, cpu in of.items())
        self._own, self._of = own, of
        return seconds


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
