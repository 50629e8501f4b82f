"""False alarms of the one rule that looks at pairs of rows and inputs, on healthy windows; and what it finds.

    python -m benchmarks.detection.pairs --windows 4000 --write docs/measured/detection.md
    python -m benchmarks.detection.pairs --windows 4000 --rows rows.npz --name efficientnet-lite0

`benchmarks.detection.blocks` adds up sums of rows, which know nothing of their inputs. Here rows are drawn with their
inputs, of the test set, by the same five laws: a window is 6,144 rows, of which 512 are compared, as in a monitor. An
alarm is an upper bound below the threshold. That inputs must be the usual ones for the rule to be asked is left out, so
these are more alarms than a service raises, if any. How often inputs are not the usual ones is counted beside, for then
a fault of the model is not told from other traffic. In one window of ten the answers are then handed on, each to the
request that came next, and in another way half of them, chosen at random.

Last, a monitor without a canary sees 6,000 healthy rows and then answers handed on, and no image twice: of images that
repeat, the rule for shared answers finds that within two blocks.
"""

import time
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from benchmarks._page import write_between
from benchmarks.detection.blocks import binomial_bounds, chosen, light
from benchmarks.detection.runs import HOURS, five
from fullrank import Moments, Reference, SpectrumMonitor
from fullrank.dependence import input_correlation
from fullrank.neighbours import between, squared_distances
from fullrank.reading import Reading
from fullrank.sample import SAMPLE_ROWS, thinned
from fullrank.statistics import WindowStatistics
from fullrank.verdict import Verdict, thresholds

ROWS = 6144
FAULT_EVERY = 10
HEALTHY_ROWS = 6000
RATE, STEP = 20.0, 250
# Distances between so many are kept.
MOST = 4096
FAULTS = ("each handed on", "half handed on")


@dataclass
class Tally:
    """What windows of a law gave: how many, the least and the mean value in health, alarms, windows whose inputs do not
    read as usual; and of faults found."""

    law: str
    windows: int = 0
    alarms: int = 0
    unusual: int = 0
    least: float = 1.0
    total: float = 0.0
    tried: int = 0
    found: tuple[int, int] = (0, 0)


class Pairs:
    """All distances between the rows (n, d) and between their inputs (n, k), and the rule."""

    def __init__(self, reference: Reference, rows: Tensor, inputs: Tensor) -> None:
        assert reference.inputs is not None
        self.reference, self.described = reference, reference.inputs.bounded(inputs)
        self.reach = reference.inputs.reach
        self.limit = thresholds(reference, ROWS)["input_correlation"]
        self.rows = squared_distances(rows).fill_diagonal_(0).float()
        self.inputs = between(inputs[:, : reference.inputs.width].double()).float()

    def usual(self, shown: Tensor) -> bool:
        """Whether the verdict takes these inputs (m,), given as indices, for the usual ones."""
        assert self.reference.inputs is not None
        read = self.reference.inputs.read(Moments(self.described.shape[1]).add(self.described[shown]))
        return Reading(WindowStatistics(300.0, rows=len(shown)), self.reference, read, False).inputs_usual()

    def read(self, answers: Tensor, shown: Tensor) -> tuple[float, bool]:
        """The correlation of answers and inputs (m,), given as indices, and whether it is abnormal."""
        rows, inputs = self.rows[answers][:, answers], self.inputs[shown][:, shown]
        found = input_correlation(rows, inputs, self.reach)
        return found.estimate, found.upper < self.limit


def handed_on(asked: Tensor, share: float, generator: Generator) -> Tensor:
    """(n,) whose answer each request gets: of this share, that of the one before."""
    return torch.where(torch.rand(len(asked), generator=generator) < share, asked.roll(1), asked)


def rows_to_detection(reference: Reference, rows: Tensor, inputs: Tensor, seed: int) -> tuple[int | None, str]:
    """Rows from the first answer handed on to the first verdict that is not healthy, and this verdict's reason; None
    where all remain healthy. Each row (n, d) comes once."""
    order = torch.randperm(len(rows), generator=Generator().manual_seed(seed))
    healthy, asked = order[:HEALTHY_ROWS], order[HEALTHY_ROWS:]
    now = [0.0]
    with SpectrumMonitor(rows.shape[1], reference, (300.0,), clock=lambda: now[0]) as monitor:

        def show(answers: Tensor, shown: Tensor) -> Verdict:
            now[0] += len(shown) / RATE
            monitor.observe(rows[answers], inputs=inputs[shown])
            monitor.flush()
            return monitor.snapshot().verdict

        for part in torch.split(healthy, STEP):
            verdict = show(part, part)
        if verdict.state != "healthy":
            return 0, verdict.reason
        for i, (answers, shown) in enumerate(
            zip(torch.split(asked.roll(1), STEP), torch.split(asked, STEP), strict=True)
        ):
            verdict = show(answers, shown)
            if verdict.state != "healthy":
                return i * STEP + len(shown), verdict.reason
    return None, verdict.reason


def report(tallies: list[Tally], limit: float, seconds: float) -> str:
    """The table of laws, and the bounds that the counts imply."""
    lines = [
        f"| law | windows | mean | least | alarms | inputs unusual | {', found | '.join(FAULTS)}, found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in tallies:
        found = " | ".join(f"{count} of {t.tried}" for count in t.found)
        mean = t.total / t.windows
        lines.append(f"| {t.law} | {t.windows:,} | {mean:.2f} | {t.least:.2f} | {t.alarms} | {t.unusual} | {found} |")
    windows, alarms = sum(t.windows for t in tallies), sum(t.alarms for t in tallies)
    low, high = binomial_bounds(alarms, windows)
    lines.append(
        f"\nAbnormal below {limit:.3f}. {alarms} false alarms in {windows:,} healthy windows: {alarms / windows:.2%}, "
        f"95 % interval {low:.2%} to {high:.3%}. {seconds:.0f} CPU seconds."
    )
    return "\n".join(lines)


def main() -> None:
    """Draw the windows, print the counts and the bounds."""
    options, (name, reference, *all_of) = chosen(__doc__, "--windows", 4000)
    rows, labels, inputs = (it[:MOST] for it in all_of)
    started = time.process_time()
    pairs = Pairs(reference, rows, inputs)
    generator = Generator().manual_seed(options.seed)
    tallies = []
    for law, draw in five(labels, light(reference, inputs), options.seed).items():
        tally = Tally(law)
        tallies.append(tally)
        for i in range(options.windows // 5):
            asked = draw(ROWS, HOURS * float(torch.rand(1, generator=generator)))
            few = thinned(torch.arange(ROWS), SAMPLE_ROWS)
            value, alarm = pairs.read(asked[few], asked[few])
            tally.windows += 1
            tally.alarms += alarm
            tally.unusual += not pairs.usual(asked)
            tally.total += value
            tally.least = min(tally.least, value)
            if i % FAULT_EVERY == 0:
                tally.tried += 1
                each, half = (
                    pairs.read(handed_on(asked, share, generator)[few], asked[few])[1] for share in (1.0, 0.5)
                )
                tally.found = (tally.found[0] + each, tally.found[1] + half)
        print(report(tallies, pairs.limit, time.process_time() - started), flush=True)
    text = report(tallies, pairs.limit, time.process_time() - started)
    if len(all_of[0]) > HEALTHY_ROWS + STEP:
        found, reason = rows_to_detection(reference, all_of[0], all_of[2], options.seed)
        text += f"\n\nWithout an image that repeats, after {found} rows: {reason}."
        print(text)
    if options.write:
        write_between(options.write, f"<!-- {name}, pairs: start -->", f"<!-- {name}, pairs: end -->", text)


if __name__ == "__main__":
    main()
