"""What the monitor costs: observe(), its thread's CPU time a row, a refresh, memory; beside a ResNet's forward pass.

    python -m benchmarks.monitor_cost --dimension 512 --batch 1 32 256

The forward is a ResNet-18 (512 dimensions) or ResNet-50 (2048) at 224 x 224 on the device, on one thread where that
is the CPU, as is the monitor's: the share is of CPU time against CPU time, whatever else the machine does.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fullrank import Reference, SpectrumMonitor
from models.backbones import ResNet


def median_seconds(action: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Median time of an action by a clock."""
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        times.append(clock() - started)
    return statistics.median(times)


def reference(dimension: int) -> Reference:
    """A reference of random directions: only its size matters here."""
    scale = torch.arange(1, dimension + 1).float() ** -0.5
    return Reference.build(*(torch.randn(2 * dimension, dimension) * scale for _ in range(2)))


def main() -> None:
    """Print the figures for one dimension."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, choices=(512, 2048), default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rows", type=int, default=8192, help="rows to feed the monitor")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    d, device = options.dimension, torch.device(options.device)
    encoder = ResNet("resnet18" if d == 512 else "resnet50").eval().to(device)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    now = [0.0]
    with SpectrumMonitor(d, reference(d), clock=lambda: now[0], buffer_rows=1 << 17) as monitor:
        rows = torch.randn(options.rows, d)
        monitor.observe(rows[:512])
        monitor.flush()
        before, target = monitor.counters.seconds, 512 + options.rows // 512 * 512
        for part in torch.split(rows[: target - 512], 512):
            monitor.observe(part)
        while monitor.counters.rows["sampled"] < target:
            time.sleep(0.01)
        per_row = (monitor.counters.seconds - before) / (target - 512)
        for _ in range(12):
            now[0] += 20.0
            monitor.observe(rows[:512])
            monitor.flush()
        before = monitor.counters.seconds
        monitor.flush()
        refresh = monitor.counters.seconds - before
        groups = monitor.snapshot().windows[3600.0].groups
        print(f"d = {d}: {1e6 * per_row:.1f} us of CPU a row; a refresh {1000 * refresh:.0f} ms with {groups} groups")
        print(f"memory of the windows when full: {20 * d * d * 8 / 1e6:.0f} MB")
        print("| batch | observe, us | forward, ms | monitor's share of the forward |\n|---|---|---|---|")
        for batch in options.batch:
            images, embedded = torch.randn(batch, 3, 224, 224, device=device), torch.randn(batch, d, device=device)

            @torch.inference_mode()
            def forward(images: torch.Tensor = images) -> None:
                encoder(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()

            forward()
            seconds = median_seconds(forward, 3, clock)
            observe = median_seconds(lambda rows=embedded: monitor.observe(rows), 200, time.perf_counter)  # type: ignore[misc]
            share = (batch * per_row + observe) / seconds
            print(f"| {batch} | {1e6 * observe:.0f} | {1000 * seconds:.1f} | {100 * share:.2f} % |", flush=True)


if __name__ == "__main__":
    main()
