"""What the monitor costs: observe(), its thread's CPU time a row, a refresh, memory; beside a ResNet's forward pass.

    python -m benchmarks.monitor_cost --dimension 512 --batch 1 32 256

The forward is that of a ResNet-18 (512 dimensions) or ResNet-50 (2048) at 224 x 224. On the CPU both it and the monitor
get one thread, and the share is of CPU time against CPU time, whatever else the machine does. On a GPU, `--device
cuda`, the caller pays for observe() alone, copy on the device included; the monitor's thread takes CPU time that the
forward does not use, shown as the share of one core while images pass at full speed: above 100 %, rows are dropped and
counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from fullrank import Reference, SpectrumMonitor
from fullrank.monitor.blocks import Batch
from fullrank.statistics import measure
from models.backbones.resnet import ResNet

WINDOWS = (300.0, 3600.0)


def median_seconds(action: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Median time of an action by a clock."""
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        times.append(clock() - started)
    return statistics.median(times)


def random_reference(dimension: int) -> Reference:
    """A reference of random directions: only its size matters here."""
    scale = torch.arange(1, dimension + 1).float() ** -0.5
    return Reference.build(*(torch.randn(2 * dimension, dimension) * scale for _ in range(2)), calibrate=False)


class Bench:
    """A monitor on a clock of its own, with both windows full of groups."""

    def __init__(self, dimension: int, rows: int, device: torch.device) -> None:
        self.now = 0.0
        self.device = device
        self.monitor = SpectrumMonitor(
            dimension, random_reference(dimension), WINDOWS, clock=lambda: self.now, buffer_rows=1 << 17
        )
        self.rows = torch.randn(rows // 512 * 512, dimension)

    def fill(self) -> None:
        """Let an hour and five minutes pass, a block at a time."""
        with self.monitor._worker.state:  # the worker, whose refreshes would only take time, waits
            for step in [360.0] * 12 + [30.0] * 12:
                self.now += step
                self.monitor._worker.blocks.take([Batch(self.now, self.rows[:256], None, None, None)], everything=True)
        self.monitor.flush()

    def seconds_per_row(self) -> float:
        """CPU time of the monitor's thread to take in a row."""
        before, sampled = self.monitor.counters.seconds, self.monitor.counters.rows["sampled"]
        for part in torch.split(self.rows, 512):
            self.monitor.observe(part)
        while self.monitor.counters.rows["sampled"] < sampled + len(self.rows):
            time.sleep(0.01)
        with self.monitor._worker.state:  # the worker is done with the last block, and has yet to count its time
            pass
        time.sleep(0.5)
        return (self.monitor.counters.seconds - before) / len(self.rows)

    def refresh_seconds(self, repeats: int) -> dict[float, tuple[int, float]]:
        """window in seconds -> its groups, and the CPU time of measuring it: a refresh is that of one window."""
        monitor = self.monitor
        with monitor._worker.state:
            held = {seconds: monitor._worker.blocks.ring.within(seconds, self.now) for seconds in WINDOWS}
            return {
                seconds: (
                    len(blocks),
                    median_seconds(
                        partial(measure, seconds, blocks, monitor.reference, monitor.dimension),
                        repeats,
                        time.thread_time,
                    ),
                )
                for seconds, blocks in held.items()
            }

    def megabytes(self) -> float:
        """What the windows hold."""
        return sum(tensor.nbytes for tensor in self.monitor.state().values()) / 1e6

    def observe_seconds(self, batch: int) -> float:
        """Wall time the caller waits for observe(), the copy on its device included."""
        rows = torch.randn(batch, self.rows.shape[1], device=self.device)

        def observe() -> None:
            self.monitor.observe(rows)
            synchronize(self.device)

        self.monitor.flush()
        return median_seconds(observe, 200, time.perf_counter)


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward_seconds(encoder: ResNet, batch: int, device: torch.device, repeats: int) -> float:
    """Time of a forward pass: CPU time on the CPU, wall time on an accelerator."""
    images = torch.randn(batch, 3, 224, 224, device=device)

    def forward() -> None:
        with torch.inference_mode():
            encoder(images)
        synchronize(device)

    forward()
    return median_seconds(forward, repeats, time.thread_time if device.type == "cpu" else time.perf_counter)


def main() -> None:
    """Print the figures for one dimension."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, choices=(512, 2048), default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--rows", type=int, default=8192, help="rows to feed the monitor")
    parser.add_argument("--repeats", type=int, default=3, help="forward passes and refreshes to take the median of")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    d, device = options.dimension, torch.device(options.device)
    bench = Bench(d, options.rows, device)
    with bench.monitor:
        bench.fill()
        per_row, refresh = bench.seconds_per_row(), bench.refresh_seconds(options.repeats)
        print(f"d = {d}: {1e6 * per_row:.1f} us of CPU a row, {1 / per_row:.0f} rows/s on one core")
        for window, (groups, seconds) in refresh.items():
            print(f"a refresh of the window of {window:g} s, {groups} groups: {seconds:.3f} s of CPU")
        print(f"the windows hold {bench.megabytes():.0f} MB", flush=True)
        encoder = ResNet("resnet18" if d == 512 else "resnet50").eval().to(device)
        if device.type == "cpu":
            print(
                "| batch | observe, us | forward, ms | monitor and observe, share of the forward |\n|---|---|---|---|"
            )
        else:
            print("| batch | observe, us | forward, ms | observe, share | one core, share |\n|---|---|---|---|---|")
        for batch in options.batch:
            seconds = forward_seconds(encoder, batch, device, options.repeats)
            observe, thread = bench.observe_seconds(batch), batch * per_row
            shares = [(observe + thread) / seconds] if device.type == "cpu" else [observe / seconds, thread / seconds]
            cells = " | ".join(f"{100 * share:.2f} %" for share in shares)
            print(f"| {batch} | {1e6 * observe:.0f} | {1000 * seconds:.1f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
