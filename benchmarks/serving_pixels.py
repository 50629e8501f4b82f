"""The service against the bare encoder on one device, ResNet-18 and ResNet-50 at 224, pixels in the requests.

    python -m benchmarks.serving_pixels --device cuda --dtype bfloat16

Requests are those of the Open Inference Protocol: uint8 pixels as they go into the encoder, one or 64 images each, from
wrk. The limit is the same encoder in a loop over 64 images that already lie on the device. Each round measures the
loop before and after each load, with the service halted; ratios are taken within rounds, their intervals bootstrapped
over rounds. The monitor is on, as it is by default, and no two requests of a load's 16 bodies are alike.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.serving.report import bootstrap
from models.artifact import Architecture, Artifact, EncoderCard, Preprocessing, save
from models.backbones import Name
from models.embedder import Embedder

ROOT = Path(__file__).parents[1]
BATCH, BODIES = 64, 16
CONNECTIONS = {1: 128, BATCH: 4}  # by images a request
LEAD, TAIL = 1.0, 0.2  # seconds of a load before it is steady, and before it ends
CONTENT = "application/octet-stream"
Pixels = NDArray[np.uint8]


def make(name: Name, size: int, folder: Path) -> Artifact:
    """An encoder with random weights: only its cost matters here."""
    torch.manual_seed(0)
    architecture = Architecture(name=name)
    encoder = architecture.build().eval()
    preprocessing = Preprocessing(size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    card = EncoderCard(name=name, architecture=architecture, preprocessing=preprocessing, dimension=encoder.dimension)
    return save(Artifact(card, encoder), folder)


def request_body(pixels: Pixels) -> tuple[bytes, int]:
    """An inference request with a binary tail, and the length of what comes before the tail."""
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": pixels.shape}
    head = json.dumps(
        {
            "inputs": [tensor | {"parameters": {"binary_data_size": pixels.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return head + pixels.tobytes(), len(head)


class Server:
    """`fullrank serve` in a process of its own."""

    def __init__(self, encoder: Path, options: argparse.Namespace) -> None:
        with socket.socket() as it:
            it.bind(("127.0.0.1", 0))
            port = it.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/v2/models/{encoder.name}/infer"
        flags = {"encoder": encoder, "port": port, "max_batch": BATCH}
        flags |= {name: getattr(options, name) for name in ("device", "dtype", "threads")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve"],
            env=os.environ | {f"FULLRANK_{name.upper()}": str(value) for name, value in flags.items()},
            cwd=ROOT,
        )
        while True:
            try:
                urllib.request.urlopen(f"{self.base}/readyz", timeout=10).close()
                return
            except OSError as error:
                if self.process.poll() is not None:
                    raise SystemExit(f"the service ended with {self.process.returncode}") from error
                time.sleep(0.2)

    def check(self, pixels: Pixels, wanted: torch.Tensor) -> float:
        """The least cosine between its answers and the bare encoder's rows. SystemExit below 0.999."""
        body, head = request_body(pixels)
        headers = {"Content-Type": CONTENT, "Inference-Header-Content-Length": str(head)}
        with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=120) as answer:
            tail = answer.read()[int(answer.headers["Inference-Header-Content-Length"]) :]
        rows = torch.frombuffer(bytearray(tail), dtype=torch.float32).view(wanted.shape)
        cosine = float(torch.nn.functional.cosine_similarity(rows, wanted).min())
        if not cosine > 0.999:
            raise SystemExit(f"the service answers something else: cosine {cosine:.5f}")
        return cosine

    def images_a_second(self, bodies: Path, images: int, head: int, seconds: int) -> float:
        """Under load, while it is steady. SystemExit if a request fails."""
        start = time.monotonic() + LEAD
        end = start + seconds - LEAD - TAIL
        script = str(ROOT / "benchmarks/serving/post.lua")
        lua = [str(bodies), str(BODIES), CONTENT, CONTENT, "0", "0", str(start), str(end), str(head)]
        options = ["-t1", f"-c{CONNECTIONS[images]}", f"-d{seconds}s", "--timeout", "60s", "-s", script]
        done = subprocess.run(["wrk", *options, self.url, "--", *lua], capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.partition("JSON ")[2])
        if result["bad"] or result["broken"]:
            raise SystemExit(f"{result['bad']} requests refused, {result['broken']} broken")
        return float(result["answered"] * images / (end - start))


def bare(embedder: Embedder, pixels: torch.Tensor, seconds: float) -> float:
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
    embedder = Embedder(
        make(name, options.size, folder / name), options.device, getattr(torch, options.dtype), max_batch=BATCH
    )
    embedder.warm_up((BATCH,))
    shape = (BODIES, BATCH, 3, options.size, options.size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    heads = {}
    for images in CONNECTIONS:
        (place := folder / str(images)).mkdir()
        for i in range(BODIES):
            body, heads[images] = request_body(pixels[i, :images])
            (place / f"{i:04}").write_bytes(body)
    there = torch.from_numpy(pixels[0]).to(options.device)
    server = Server(folder / name, options)
    try:
        server.check(pixels[0], embedder.embed(there))
        found: dict[int, list[tuple[float, float]]] = {images: [] for images in CONNECTIONS}
        for _ in range(options.rounds):
            for images, figures in found.items():
                server.process.send_signal(signal.SIGSTOP)
                before = bare(embedder, there, options.seconds / 8)
                server.process.send_signal(signal.SIGCONT)
                served = server.images_a_second(folder / str(images), images, heads[images], options.seconds)
                server.process.send_signal(signal.SIGSTOP)
                after = bare(embedder, there, options.seconds / 8)
                server.process.send_signal(signal.SIGCONT)
                figures.append(((before + after) / 2, served))
    finally:
        server.process.kill()
        server.process.wait()
    for images, figures in found.items():
        limit, served = (statistics.median(each) for each in zip(*figures, strict=True))
        middle, low, high = bootstrap([ours / limit for limit, ours in figures])
        cells = f"{limit:.0f} | {served:.0f} | {middle:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {name} | {images} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
