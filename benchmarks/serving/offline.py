"""The limit: one process that decodes and embeds in a loop. Each line "BATCH SECONDS" on stdin is one measurement."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.serving.workload import Workload


def measure(workload: Workload, images: list[bytes], batch: int, seconds: float) -> dict[str, float]:
    """Images and CPU seconds of one process, and the latency of a batch in seconds."""
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    workload(batches[0])
    times: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    while (last := time.perf_counter()) < started + seconds:
        workload(batches[len(times) % len(batches)])
        times.append(time.perf_counter() - last)
    p50, p99 = np.percentile(times, (50, 99))
    spent = time.process_time() - cpu
    return {"seconds": last - started, "requests": len(times) * batch, "cpu": spent, "p50": p50, "p99": p99}


def main() -> None:
    workload = Workload.from_environment()
    folder = Path(os.environ["BENCH_FOLDER"], f"{os.environ['BENCH_MODEL']}-jpeg")
    images = [path.read_bytes() for path in sorted(folder.iterdir())]
    print("ready", flush=True)
    for line in sys.stdin:
        batch, seconds = line.split()
        print(json.dumps(measure(workload, images, int(batch), float(seconds))), flush=True)


if __name__ == "__main__":
    main()
