"""Bias of the window's participation ratio and of the two counters on iid, sessioned and drifting traffic.

    python -m benchmarks.estimators_window

Rows come from ten classes in 64 dimensions: iid; sessions, runs of 32 rows of one class; drift, a class mix that
turns from one half of the classes to the other over the window. The truth is that of all rows' law over the window.
Estimators: the U-statistic over all pairs of rows (`Moments`), the same within 5-minute groups of blocks as the
monitor holds them, the ratio of the counters (`trace_product / frobenius_product`), and the band energy of the head
and of the tail, which are counters too. A second table shows what the ratio of the counters' sums over four replicas
says beside each replica and beside the merged moments.
"""

import argparse
import math

import torch
from torch import Tensor

from fullrank import Moments, Reference, SpectrumMonitor, merge

D, CLASSES, SESSION = 64, 10, 32
WINDOW = 300.0


class Law:
    """Ten Gaussian classes around centres in the leading nine directions, on the unit sphere."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres = torch.zeros(CLASSES, D)
        self.centres[:, :9] = torch.randn(CLASSES, 9, generator=generator)
        self.scale = torch.arange(1, D + 1).float() ** -0.5

    def rows(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """(n, d) unit rows of (n,) classes."""
        rows = self.centres[labels] + torch.randn(len(labels), D, generator=generator) * self.scale
        return torch.nn.functional.normalize(rows)


def labels(traffic: str, n: int, generator: torch.Generator) -> Tensor:
    """(n,) classes in order of arrival."""
    if traffic == "sessions":
        return torch.randint(CLASSES, (n // SESSION,), generator=generator).repeat_interleave(SESSION)
    drawn = torch.randint(CLASSES, (n,), generator=generator)
    if traffic == "drift":
        late = torch.rand(n, generator=generator) < torch.arange(n) / n
        return drawn // 2 + late.long() * (CLASSES // 2)
    return drawn


def replicas(law: Law, generator: torch.Generator, n: int = 6144) -> None:
    """Print what the sum over replicas reads when all are alike, when one has collapsed, when each sees its own."""

    def mixed() -> Tensor:
        return law.rows(labels("iid", n, generator), generator)

    def of_class(label: int) -> Tensor:
        return law.rows(torch.full((n,), label), generator)

    point = torch.nn.functional.normalize(torch.ones(n, D) + 1e-3 * torch.randn(n, D, generator=generator))
    plane = mixed()
    plane[:, 2:] = 0
    fleets = {
        "four alike": [mixed() for _ in range(4)],
        "one of four collapsed to a point": [*(mixed() for _ in range(3)), point],
        "one of four collapsed to a plane": [*(mixed() for _ in range(3)), plane],
        "each sees one class": [of_class(label) for label in range(4)],
    }
    print("\n| fleet | each replica | sum of rates | merged moments |\n|---|---|---|---|")
    for name, parts in fleets.items():
        moments, trace, frobenius = [], 0.0, 0.0
        for rows in parts:
            with SpectrumMonitor(D, windows=(WINDOW,), clock=lambda: 0.0) as monitor:
                monitor.observe(rows)
                monitor.flush()
                moments.append(monitor.moments())
                trace += monitor.counters.trace_product
                frobenius += monitor.counters.frobenius_product
        each = ", ".join(f"{it.participation_ratio():.1f}" for it in moments)
        print(f"| {name} | {each} | {trace / frobenius:.1f} | {merge(moments).participation_ratio():.1f} |")


def main() -> None:
    """Print one line per kind of traffic and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 6144])
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    law, generator = Law(), torch.Generator().manual_seed(2)
    reference = Reference.build(
        *(law.rows(torch.randint(CLASSES, (20000,), generator=generator), generator) for _ in range(2)), calibrate=False
    )
    many = Moments(D).add(law.rows(torch.randint(CLASSES, (200000,), generator=generator), generator))
    truth = many.participation_ratio()
    print(
        f"true participation ratio {truth:.2f}; bias and standard deviation in per cent, covered: truth within bounds"
    )
    print("| traffic | rows | window | bounds cover | counters | head | tail |\n|---|---|---|---|---|---|---|")
    for traffic in ("iid", "sessions", "drift"):
        for n in options.rows:
            found: list[list[float]] = []
            for _ in range(options.repeats):
                now = [0.0]
                with SpectrumMonitor(D, reference, (WINDOW,), clock=lambda now=now: now[0]) as monitor:  # type: ignore[misc]
                    for i, part in enumerate(torch.split(law.rows(labels(traffic, n, generator), generator), 256)):
                        now[0] = i * 256 * 0.99 * WINDOW / n
                        monitor.observe(part)
                        monitor.flush()
                    window, counters = monitor.snapshot().windows[WINDOW], monitor.counters
                ratio = window.participation_ratio
                found.append(
                    [
                        ratio.estimate / truth - 1,
                        float(ratio.lower <= truth <= ratio.upper),
                        counters.trace_product / counters.frobenius_product / truth - 1,
                        window.head.estimate - 1,
                        sum(band.ratio.estimate for band in window.tail) / len(window.tail) - 1,
                    ]
                )
            values = 100 * torch.tensor(found)
            mean, spread = values.mean(0).tolist(), values.std(0).tolist()
            cells = [f"{mean[i]:+.1f} ± {spread[i]:.1f}" if i != 1 else f"{mean[i]:.0f} %" for i in range(5)]
            error = math.sqrt(options.repeats)
            print(f"| {traffic} | {n} | " + " | ".join(cells) + f" | (errors of the means: deviation / {error:.1f})")
    replicas(law, generator)


if __name__ == "__main__":
    main()
