"""Our service against a bare decode-and-forward loop, a plain thread batcher and its peers; load from wrk.

    python -m benchmarks.serving [--rounds 10] [--servers fullrank mosec ...] [--models null resnet18]

Every round measures each server once at each level, and the loop just before and just after its fullest: the speed of a
shared machine drifts within minutes. Ratios are taken within rounds and their intervals bootstrapped over rounds.
Servers not being measured are paused. Each measurement is appended to FOLDER/results.jsonl at once: started again, the
command goes on where it stopped (--fresh begins anew).
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving import report
from benchmarks.serving.load import OPEN_SHARE, Level, Offline, Results, bodies, check, drive
from benchmarks.serving.processes import KINDS, ROOT, Running
from benchmarks.serving.workload import MODELS, Model, Workload, prepare

LEVELS = [Level("64", 64, 6), Level("open", 64, 3, open=True), Level("32", 32, 5), Level("8", 8), Level("1", 1)]
LOOPS = {("64", "before"): 32, ("64", "after"): 32, ("1", "after"): 1}  # batches of the loop beside a level
UNLIKE = Level("unlike", 64, 8, unlike=True)
LOOP_SECONDS = 1.0
OVERHEAD = 0.35  # seconds of each measurement that are not the measurement: starting wrk, reading CPU times


def levels(server: str, model: Model, servers: list[str]) -> list[Level]:
    """The loads a server gets. What monitoring costs is asked with images that all differ: it skips duplicates."""
    both = model == "resnet18" and {"fullrank", "fullrank, monitor off"} <= set(servers)
    unlike = [UNLIKE] if both and server.startswith("fullrank") else []
    # First, so that both servers come to it alike: just woken, and warmed up.
    return unlike if server == "fullrank, monitor off" else [*unlike, *LEVELS]


def start(model: Model, names: list[str], folder: Path) -> list[Running]:
    """Start, check, warm up and pause the servers; one that cannot run is named and left out."""
    images = [path.read_bytes() for path in sorted((folder / f"{model}-jpeg").iterdir())][:8]
    wanted, running = Workload(folder, model)(images), []
    for name in names:
        try:
            server = Running(name, model, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{model}: {name} cannot be installed or started: {error}", flush=True)
            continue
        try:
            server.wait(images[0])
            cosine = check(server, images, wanted)
            for connections in (8, 64):
                drive(server, bodies(folder, server, model, "jpeg"), Level("", connections, 1))
        except (RuntimeError, OSError, ValueError) as error:
            print(f"{model}: {name} left out: {error}", flush=True)
            server.stop()
            continue
        server.pause()
        running.append(server)
        print(f"{model}: {name} answers, cosine {cosine:.6f}", flush=True)
    return running


def measure_all(results: Results, model: Model, options: argparse.Namespace, tick: Callable[[str], None]) -> None:
    """All rounds of one model."""
    names = [name for name in options.servers if levels(name, model, options.servers)]
    wanted = [(name, level.name) for name in names for level in levels(name, model, options.servers)]
    rounds = range(options.rounds)
    if all(results.find(model=model, round=it, server=name, level=level) for it in rounds for name, level in wanted):
        return
    running, offline = start(model, names, options.folder), Offline(model, options.folder)

    def loop(server: Running, level: Level, when: str) -> None:
        here = key | {"server": "offline", "level": level.name, "beside": server.name, "when": when}
        if (batch := LOOPS.get((level.name, when))) is not None and not results.find(**here):
            tick(f"{model} round {number + 1}: offline, beside {server.name}")
            server.pause()
            results.add(here | offline.measure(batch, LOOP_SECONDS))
            server.resume()

    try:
        for number in rounds:
            key = {"model": model, "round": number}
            # Another order each round: whoever follows a heavy neighbour is not always the same.
            for server in running[number % len(running) :] + running[: number % len(running)]:
                server.resume()
                jpegs = bodies(options.folder, server, model, "jpeg")
                own = levels(server.name, model, options.servers)
                if not results.find(**key, server=server.name, level=own[-1].name):
                    # Whatever learns from timing must first forget its pause.
                    drive(server, jpegs, Level("", 64, 1))
                for level in own:
                    loop(server, level, "before")
                    here = key | {"server": server.name, "level": level.name}
                    if not results.find(**here):
                        tick(f"{model} round {number + 1}: {server.name}, {level.name}")
                        full = results.find(**key, server=server.name, level="64") if level.open else None
                        rate = OPEN_SHARE * full["requests"] / full["seconds"] if full else 0.0
                        images = bodies(options.folder, server, model, "bmp") if level.unlike else jpegs
                        results.add(here | drive(server, images, level, rate))
                    loop(server, level, "after")
                server.pause()
    finally:
        offline.stop()
        for server in running:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--servers", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=", ".join(KINDS)
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/serving")
    parser.add_argument("--fresh", action="store_true", help="forget earlier measurements in the folder")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; apt-get install wrk")
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options.folder)
    results = Results(options.folder / "results.jsonl", options.fresh)
    plan = [level for m in options.models for s in options.servers for level in levels(s, m, options.servers)]
    loops = len(LOOPS) * len(options.servers) * len(options.models)
    servers = set(options.servers)
    had = sum(
        it["model"] in options.models and it["round"] < options.rounds and not servers.isdisjoint(it.values())
        for it in results.records
    )
    left = options.rounds * (len(plan) + loops) - had
    each = (sum(level.seconds for level in plan) + loops * LOOP_SECONDS) / (len(plan) + loops) + OVERHEAD
    started, done = time.monotonic(), 0
    # Starting each server once for each model, and waking it in each round.
    starts = (12 + options.rounds * (1 + OVERHEAD)) * len(options.servers) * len(options.models)
    print(
        f"{left} measurements of {each - OVERHEAD:.1f} s: about {(left * each + starts) / 60:.0f} minutes", flush=True
    )

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        spent = time.monotonic() - started
        print(f"[{done}/{left}, {spent / 60:.1f} min, {(left - done) * each / 60:.0f} left] {what}", flush=True)

    try:
        for model in options.models:
            measure_all(results, model, options, tick)
    finally:
        if results.records:
            report.write(results.records, options.folder)


if __name__ == "__main__":
    main()
