"""The service against the bare encoder on one device, ResNet-18 and ResNet-50 at 224, pixels in the requests.

    python -m benchmarks.serving_pixels --device cuda --dtype bfloat16

Requests are those of the Open Inference Protocol: uint8 pixels as they go into the encoder, one or 64 images each, from
wrk. The limit is the same encoder in a loop over 64 images that already lie in memory. Each round measures the
loop before and after each load, with the service halted; ratios are taken within rounds, their intervals bootstrapped
over rounds. The monitor is on, as it is by default; bodies repeat after 16, and it skips what it has seen.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.serving.load import Level, check, drive
from benchmarks.serving.processes import KINDS, Running
from benchmarks.serving.report import bootstrap
from benchmarks.serving.workload import random_encoder
from models.artifact import Architecture, save
from models.backbones.resnet import Name
from models.embedder import Embedder

BATCH, BODIES = 64, 16
CONNECTIONS = {1: 128, BATCH: 4}  # by images a request
HEAD = 256  # bytes
Pixels = NDArray[np.uint8]


def request_body(pixels: Pixels) -> bytes:
    """An inference request with a binary tail, after HEAD bytes of JSON."""
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": pixels.shape}
    head = {
        "inputs": [tensor | {"parameters": {"binary_data_size": pixels.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    return json.dumps(head).encode().ljust(HEAD) + pixels.tobytes()


def bare(embedder: Embedder, pixels: Pixels, seconds: float) -> float:
    """Images a second of the encoder in a loop; each pass ends with its rows on the host."""
    embedder.embed(pixels)
    passes, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        embedder.embed(pixels)
        passes += 1
    return passes * len(pixels) / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=get_args(Name), default=["resnet18", "resnet50"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of a forward pass on a CPU")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--seconds", type=int, default=8, help="of each load; the loop gets a quarter of it")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; apt-get install wrk")
    torch.set_num_threads(options.threads)
    print("| encoder | images a request | bare, images/s | service, images/s | of bare |\n" + "|---" * 5 + "|")
    for name in options.encoders:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options)


def measure(name: Name, folder: Path, options: argparse.Namespace) -> None:
    """Print the lines of one encoder."""
    artifact = save(random_encoder(name, Architecture(name=name), options.size), folder / name)
    embedder = Embedder(artifact, options.device, getattr(torch, options.dtype), max_batch=BATCH)
    embedder.warm_up((BATCH,))
    shape = (BODIES, BATCH, 3, options.size, options.size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for images in CONNECTIONS:
        (place := folder / str(images)).mkdir()
        for i in range(BODIES):
            (place / f"{i:04}").write_bytes(request_body(pixels[i, :images]))
    flags = {"max_batch": BATCH} | {flag: getattr(options, flag) for flag in ("device", "dtype", "threads")}
    kind = replace(
        KINDS["fullrank"],
        path=f"/v2/models/{name}/infer",
        content_type="application/octet-stream",
        rows=lambda answer: np.frombuffer(answer[-4 * embedder.dimension :], "<f4")[None],
        environment={f"FULLRANK_{flag.upper()}": str(value) for flag, value in flags.items()},
        head=HEAD,
    )
    server = Running("fullrank", name, folder, kind)
    try:
        ones = [(folder / "1" / f"{i:04}").read_bytes() for i in range(BODIES)]
        server.wait(ones[0])
        check(server, ones, embedder.embed(pixels[:, 0]).numpy())
        server.pause()
        found: dict[int, list[tuple[float, float]]] = {images: [] for images in CONNECTIONS}
        for _ in range(options.rounds):
            for images, figures in found.items():
                level = Level(str(images), CONNECTIONS[images], options.seconds, lead=1.0)
                before = bare(embedder, pixels[0], options.seconds / 8)
                server.resume()
                load = drive(server, folder / str(images), level)
                server.pause()
                after = bare(embedder, pixels[0], options.seconds / 8)
                if load["bad"] or load["broken"]:
                    raise SystemExit(f"{load['bad']:.0f} requests refused, {load['broken']:.0f} broken")
                figures.append(((before + after) / 2, images * load["requests"] / load["seconds"]))
    finally:
        server.stop()
    for images, figures in found.items():
        limit, served = (statistics.median(each) for each in zip(*figures, strict=True))
        middle, low, high = bootstrap([ours / limit for limit, ours in figures])
        cells = f"{limit:.0f} | {served:.0f} | {middle:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {name} | {images} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
