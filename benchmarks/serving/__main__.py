"""Our service against bare decode-and-forward loops, a plain thread batcher and its peers; load from wrk.

    python -m benchmarks.serving [--rounds 10] [--servers fullrank mosec ...] [--models null resnet18 efficientnet]
    python -m benchmarks.serving --rounds 3 --goals    what the goals compare, and nothing else

Every round measures each server at each level, and the loops just before and after its fullest and its lightest: the
speed of a shared machine drifts within seconds, so what our goals compare is measured in slices, in turns. The loop
called offline runs onnxruntime. Beside our service eager PyTorch loops too, and beside our service in bfloat16 a loop
in bfloat16. Peers run in float32. Ratios are taken within rounds and their intervals bootstrapped over rounds. Servers
not being measured are paused. Each measurement is appended to FOLDER/results.jsonl at once: started again, the command
goes on where it stopped (--fresh begins anew).
"""

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.serving import report
from benchmarks.serving.load import OPEN_SHARE, Level, Offline, Results, bodies, check, drive
from benchmarks.serving.processes import KINDS, ROOT, Running, bring_efficientnet
from benchmarks.serving.report import COARSE
from benchmarks.serving.workload import MODELS, Model, Workload, prepare

FULL, ONE = Level("64", 64, 6, loop=32), Level("1", 1, loop=1)
OTHERS = [Level("open", 64, 3, open=True), Level("32", 32, 5), Level("8", 8)]
# What a pause has earned for the monitor's sample must be spent before it is steady.
UNLIKE = Level("unlike", 64, 7, unlike=True, lead=2.5, slices=4)
FINE = 3  # slices of what our goals are about
ONE_SERVER = ("fullrank", "fullrank, monitor off")
# In bfloat16 (report.COARSE) we serve ResNet-18 only: EfficientNet-Lite0 is a graph, which runs in float32.
RIVALS = ("thread batcher", "mosec", "mosec onnx")  # those that our goals name
UNASKED = {"null": ("mosec onnx",), "efficientnet": ("mosec", "mosec onnx")}  # that no goal compares
LOOPS = {"offline": "onnx", "offline, eager": "torch", "offline, bfloat16": "bfloat16"}
LOOP_SECONDS = 1.0
OVERHEAD = 0.35  # seconds of each measurement that are not the measurement: starting wrk, reading CPU times


def levels(server: str, model: Model, options: argparse.Namespace) -> list[Level]:
    """The loads that a server gets beside the loops, the fullest first."""
    if server == ONE_SERVER[1] or (model == "efficientnet" and server not in (ONE_SERVER[0], *RIVALS)):
        return []
    if server == COARSE and model != "resnet18":
        return []
    slices = FINE if server == ONE_SERVER[0] and model == "resnet18" else 1
    if options.goals and server in UNASKED.get(model, ()):
        return []
    if model == "efficientnet":  # a batch of 32 takes a second in eager PyTorch
        return [replace(FULL, seconds=12)] + ([] if options.goals else [replace(ONE, seconds=4)])
    if model == "resnet18" and options.goals:
        return [replace(FULL, slices=slices), replace(ONE, slices=slices)]
    if options.goals:
        return [replace(FULL, slices=slices), *(it for it in OTHERS if it.name == "32")]
    return [replace(FULL, slices=slices), *OTHERS, replace(ONE, slices=slices)]


def loops(server: str, model: Model) -> list[str]:
    """The loops that are measured beside a server."""
    if server == COARSE:
        return ["offline", "offline, bfloat16"]
    return ["offline", "offline, eager"] if server == ONE_SERVER[0] and model != "null" else ["offline"]


def watched(model: Model, servers: Sequence[str]) -> list[str]:
    """Who is asked what monitoring costs, with images that all differ: it skips duplicates."""
    return list(ONE_SERVER) if model == "resnet18" and set(ONE_SERVER) <= set(servers) else []


def plan(model: Model, options: argparse.Namespace) -> list[float]:
    """Seconds of each measurement of a round."""
    seconds = [float(UNLIKE.seconds) for _ in watched(model, options.servers) for _ in range(UNLIKE.slices)]
    for server in options.servers:
        for level in levels(server, model, options):
            seconds += [float(level.seconds)] * level.slices
            if level.loop:
                seconds += [LOOP_SECONDS] * (level.slices + 1) * len(loops(server, model))
    return seconds


def start(model: Model, names: list[str], folder: Path) -> list[Running]:
    """Start, check, warm up and pause the servers; one that cannot run is named and left out."""
    images = [path.read_bytes() for path in sorted((folder / f"{model}-jpeg").iterdir())][:8]
    wanted, running = Workload(folder, model, "onnx" if model == "efficientnet" else "torch")(images), []
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
    pair = watched(model, options.servers)
    names = [name for name in options.servers if levels(name, model, options) or name in pair]
    rounds = [it for it in range(options.rounds) if not results.find(model=model, round=it, whole=names)]
    if not rounds:
        return
    running = start(model, names, options.folder)
    wanted = dict.fromkeys(loop for name in names for loop in loops(name, model))
    idle = {name: Offline(model, options.folder, LOOPS[name]) for name in wanted}
    ours = [server for server in running if server.name in pair]
    ours = ours if len(ours) == len(ONE_SERVER) else []

    def wake(server: Running, form: str) -> None:
        server.resume()
        # Whatever learns from timing must first forget its pause.
        drive(server, bodies(options.folder, server, model, form), Level("", 64, 1))

    def load(number: int, server: Running, level: Level, part: int) -> None:
        here = {"model": model, "round": number, "server": server.name, "level": level.name}
        if not results.find(**here, slice=part):
            tick(f"{model} round {number + 1}: {server.name}, {level.name}")
            full = results.find(**here | {"level": FULL.name}) if level.open else None
            rate = OPEN_SHARE * full["requests"] / full["seconds"] if full else 0.0
            images = bodies(options.folder, server, model, "bmp" if level.unlike else "jpeg")
            results.add(here | {"slice": part} | drive(server, images, level, rate))

    def loop(number: int, server: Running, level: Level, part: int) -> None:
        for name in loops(server.name, model) if level.loop else ():
            here = {"model": model, "round": number, "server": name, "level": level.name, "beside": server.name}
            if not results.find(**here, slice=part):
                tick(f"{model} round {number + 1}: {name}, beside {server.name}")
                server.pause()
                results.add(here | {"slice": part} | idle[name].measure(level.loop, LOOP_SECONDS))
                server.resume()

    try:
        for number in rounds:
            # Another order each round: whoever follows a heavy neighbour is not always the same.
            for server in running[number % len(running) :] + running[: number % len(running)]:
                if not (own := levels(server.name, model, options)):
                    continue
                wake(server, "jpeg")
                for level in own:
                    for part in range(level.slices):
                        loop(number, server, level, part)
                        load(number, server, level, part)
                    loop(number, server, level, level.slices)
                server.pause()
            for server in ours:
                wake(server, "bmp")
                server.pause()
            for part in range(UNLIKE.slices if ours else 0):
                for server in ours if (number + part) % 2 else reversed(ours):
                    server.resume()
                    load(number, server, UNLIKE, part)
                    server.pause()
            results.add({"model": model, "round": number, "whole": names})
    finally:
        for process in idle.values():
            process.stop()
        for server in running:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--servers", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help=", ".join(KINDS)
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--goals", action="store_true", help="only the servers and loads that the goals compare")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/serving")
    parser.add_argument("--fresh", action="store_true", help="forget earlier measurements in the folder")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; apt-get install wrk")
    if options.goals:
        options.servers = [name for name in options.servers if name in (*ONE_SERVER, COARSE, *RIVALS)]
    options.folder.mkdir(parents=True, exist_ok=True)
    if "efficientnet" in options.models:
        bring_efficientnet(options.folder)
    prepare(options.folder, options.models)
    results = Results(options.folder / "results.jsonl", options.fresh)
    each = [seconds + OVERHEAD for model in options.models for seconds in plan(model, options)]
    had = sum(it["model"] in options.models and it["round"] < options.rounds for it in results.records)
    left = max(0, options.rounds * len(each) - had)
    mean = sum(each) / len(each)
    started, done = time.monotonic(), 0
    # Starting each server once for each model, and waking it in each round.
    starts = (12 + options.rounds * (1 + OVERHEAD)) * len(options.servers) * len(options.models)
    print(
        f"{left} measurements of {mean - OVERHEAD:.1f} s: about {(left * mean + starts) / 60:.0f} minutes", flush=True
    )

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        spent = time.monotonic() - started
        print(f"[{done}/{left}, {spent / 60:.1f} min, {(left - done) * mean / 60:.0f} left] {what}", flush=True)

    try:
        for model in options.models:
            measure_all(results, model, options, tick)
    finally:
        if results.records:
            report.write(results.records, options.folder)


if __name__ == "__main__":
    main()
