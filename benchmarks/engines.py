"""CPU time of one batch in each engine, on one thread: `python -m benchmarks.engines`.

It counts the process's CPU time, which neighbours on the machine disturb less than they do the clock.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import models
from benchmarks.serving.workload import random_encoder
from models.artifact import Architecture, Artifact, load
from models.engines import Engine, Name, Pixels, start

ENGINES: tuple[Name, ...] = ("torch", "onnx")
PRETRAINED = Path(models.__file__).parent / "pretrained/fashion-directclr"


def cpu_ms(engine: Engine, pixels: Pixels, seconds: float) -> float:
    """Median CPU milliseconds of a batch, over so many seconds of CPU time."""
    engine(pixels)
    times: list[float] = []
    while sum(times) < seconds:
        started = time.process_time()
        engine(pixels)
        times.append(time.process_time() - started)
    return 1e3 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds of each measurement")
    parser.add_argument("--encoders", type=Path, nargs="*", help="folders of other encoders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    artifacts: list[tuple[Artifact, tuple[int, int]]] = [
        (random_encoder("resnet18", Architecture(name="resnet18"), 64), (1, 32)),
        (random_encoder("resnet50", Architecture(name="resnet50"), 224), (1, 8)),
        (load(PRETRAINED), (1, 32)),
    ]
    if options.encoders:
        artifacts = [(load(folder), (1, 8)) for folder in options.encoders]
    print("| encoder | pixels | batch | torch, ms | onnx, ms | ratio |\n" + "|---" * 6 + "|")
    for artifact, batches in artifacts:
        how = artifact.card.preprocessing
        for batch in batches:
            pixels = np.random.default_rng(0).integers(0, 256, (batch, how.channels, how.size, how.size), np.uint8)
            found = [cpu_ms(start(artifact, name, threads=1), pixels, options.seconds) for name in ENGINES]
            torch_ms, onnx_ms = found
            cells = f"{batch} | {torch_ms:.2f} | {onnx_ms:.2f} | {torch_ms / onnx_ms:.2f}"
            print(f"| {artifact.card.name} | {how.size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
