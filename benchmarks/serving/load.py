"""Measurements: wrk against a server, the offline loop against itself, and what was measured so far, on disk."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.processes import ACCEPT, ROOT, Running, python_path
from benchmarks.serving.workload import Model, Rows

OPEN_SHARE = 0.7
TAIL = 0.2  # seconds of a load before it ends
BMP_PIXELS = 54  # where the pixels of a 24-bit BMP begin


@dataclass(frozen=True)
class Level:
    """A load: so many connections for so many seconds.

    open: arrivals do not wait for answers; unlike: no two images agree; loop: also measure the offline loop, in
    batches of so many; slices: times that this is measured in a round, in turns with what it is compared with; lead:
    seconds before it is steady.
    """

    name: str
    connections: int
    seconds: int = 2  # wrk takes whole ones
    open: bool = False
    unlike: bool = False
    loop: int = 0
    slices: int = 1
    lead: float = 0.5


def bodies(folder: Path, server: Running, model: Model, form: str) -> Path:
    """The folder of this server's request bodies, written if need be."""
    place = folder / f"{model}-{form}-{server.slug}"
    place.mkdir(exist_ok=True)
    for source in (folder / f"{model}-{form}").iterdir():
        (place / source.name).write_bytes(server.kind.body(source.read_bytes()))
    return place


def drive(server: Running, images: Path, level: Level, rate: float = 0.0) -> dict[str, float]:
    """One measurement by wrk: its figures (see post.lua), the server's answers and CPU seconds while it is steady."""
    stamp = BMP_PIXELS if level.unlike else 0
    start = time.monotonic() + level.lead
    end = start + level.seconds - level.lead - TAIL
    count, head = sum(1 for _ in images.iterdir()), [str(server.kind.head)] if server.kind.head else []
    lua = [str(images), str(count), server.kind.content_type, ACCEPT, *map(str, (stamp, rate, start, end)), *head]
    options = ["-t1", f"-c{level.connections}", f"-d{level.seconds}s", "--timeout", "30s"]
    command = ["wrk", *options, "-s", str(Path(__file__).with_name("post.lua")), server.url, "--", *lua]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
        cpu = []
        for moment in (start, end):
            time.sleep(max(0.0, moment - time.monotonic()))
            cpu.append(server.cpu_seconds())
        output, _ = wrk.communicate()
    if wrk.returncode:
        raise subprocess.CalledProcessError(wrk.returncode, command)
    result: dict[str, float] = json.loads(output.partition("JSON ")[2])
    return result | {"requests": result["answered"], "seconds": end - start, "cpu": cpu[1] - cpu[0]}


def check(server: Running, images: list[bytes], wanted: Rows) -> float:
    """The least cosine between a server's answers and the offline loop's. RuntimeError below 0.9999."""
    got = np.concatenate([server.ask(image) for image in images])
    cosine = float(((got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)).min())
    if not cosine >= 0.9999:
        raise RuntimeError(f"it answers something else: cosine {cosine:.5f} with the offline loop")
    return cosine


class Offline:
    """A loop's process, asleep between measurements. engine: onnx or torch, as for a Workload."""

    def __init__(self, model: Model, folder: Path, engine: str) -> None:
        own = {"BENCH_MODEL": model, "BENCH_ENGINE": engine, "BENCH_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}
        command, pipe = [sys.executable, "-m", "benchmarks.serving.offline"], subprocess.PIPE
        environment = os.environ | own | {"PYTHONPATH": python_path(folder)}
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self._read()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def measure(self, batch: int, seconds: float) -> dict[str, float]:
        """As offline.measure."""
        assert self._process.stdin
        self._process.stdin.write(f"{batch} {seconds}\n")
        self._process.stdin.flush()
        result: dict[str, float] = json.loads(self._read())
        return result

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Results:
    """Every measurement, appended as it is made, so that a run cut short goes on where it stopped."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        if fresh:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((it for it in self.records if key.items() <= it.items()), None)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
