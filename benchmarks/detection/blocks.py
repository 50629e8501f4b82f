"""False alarms on a million healthy blocks, resampled from embeddings that the calibration has not seen.

    python -m benchmarks.detection.blocks --blocks 1000000 --write docs/statistics.md

Each block is 256 rows of the Fashion-MNIST test set drawn afresh by one of the laws of healthy traffic, a third of the
blocks each, in unbroken streams. Two things can page: the sequential test, which is the library's own and is fed every
block, and the verdict on the window of the last 24 blocks. The window's estimates are kept up to date in float32
and compared with the thresholds block by block; an alarm needs the bound beyond the threshold, hence the estimate too,
so where no estimate is, the verdict is healthy without being computed. Windows with an estimate beyond a threshold
are handed to the library whole. The numerical rank is checked on every 24th window: disjoint, together all rows. Inputs
and the canary are left out: they only change what an alarm is called.
"""

import argparse
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import chi2
from torch import Tensor

from fullrank import Reference
from fullrank.bands import band_sums
from fullrank.calibration import BLOCK_ROWS
from fullrank.diagnosis import BAND_GONE, diagnose, thresholds
from fullrank.healthy import Traffic, columns
from fullrank.measures import numerical_rank
from fullrank.moments import Moments
from fullrank.sequential import LEVEL, Detector
from fullrank.statistics import measure, norm_histogram
from fullrank.window import Block
from models.artifact import load
from models.embedder import Embedder, normalize
from training.data import SOURCES, ImageSet

WINDOW, GROUP, CHUNK = 24, 3, 64  # blocks
BLOCKS_A_YEAR = 365.25 * 86_400 * 20 / BLOCK_ROWS
START, END = "<!-- blocks: start -->", "<!-- blocks: end -->"


@dataclass
class Tally:
    """What a law's stream of blocks did."""

    law: str
    blocks: int = 0
    sequential: int = 0  # blocks at which the sequential test alarms
    window: int = 0  # blocks at which the window's verdict is not healthy
    pages: int = 0  # runs of such blocks
    examined: int = 0  # windows handed to the library
    ranks: int = 0  # windows whose rank was checked
    peak: float = -math.inf  # log10 of the most evidence


class Stream:
    """One law's blocks, seen by the sequential test and by the window."""

    def __init__(self, reference: Reference, rows: Tensor, law: str) -> None:
        self.reference, self.rows = reference, rows
        # In the reference's directions, about its mean: energies are then the diagonals of scatters.
        self.projected = (rows - reference.mean.float()) @ reference.basis.float()
        self.detector = Detector(reference)
        self.limit = thresholds(reference, WINDOW * BLOCK_ROWS)
        self.half = (len(reference.bands) + 1) // 2
        d = reference.dimension
        self.scatters: deque[Tensor] = deque()
        self.sums: deque[Tensor] = deque()
        self.index: deque[Tensor] = deque()
        self.total = torch.zeros(d, d, dtype=torch.float64)
        self.total_sum = torch.zeros(d, dtype=torch.float64)
        self.previous: Tensor | None = None
        self.alarmed = False
        self.tally = Tally(law)

    def take(self, index: Tensor) -> None:
        """Blocks of rows (c, 256) in order."""
        blocks = self.projected[index]
        means = blocks.mean(1)
        centred = (blocks - means[:, None]) * math.sqrt(BLOCK_ROWS / (BLOCK_ROWS - 1))
        scatters = torch.bmm(centred.transpose(1, 2), centred)
        for i in range(len(index)):
            self._step(index[i], scatters[i], means[i].double())

    def _step(self, index: Tensor, scatter: Tensor, mean: Tensor) -> None:
        tally, reference = self.tally, self.reference
        energies = scatter.diagonal().double() / BLOCK_ROWS
        named = {}
        if self.previous is not None:
            frobenius = float((scatter * self.previous).sum())
            product = float(scatter.trace()) * float(self.previous.trace())
            named["participation_ratio"] = math.log(product / frobenius / reference.participation_ratio)
        self.previous = scatter
        # The mean's distance is the same in any orthonormal basis.
        statistics = columns(reference, energies, mean @ reference.basis.T + reference.mean, BLOCK_ROWS, named)
        self.detector.bet(statistics[self.detector.columns], float(tally.blocks))
        evidence = self.detector.evidence
        tally.peak = max(tally.peak, evidence.log10)
        self._roll(index, scatter, mean)
        tally.blocks += 1
        wrong = len(self.scatters) == WINDOW and self._window()
        tally.sequential += evidence.alarm
        tally.window += wrong
        tally.pages += (evidence.alarm or wrong) and not self.alarmed
        self.alarmed = evidence.alarm or wrong

    def _roll(self, index: Tensor, scatter: Tensor, mean: Tensor) -> None:
        self.scatters.append(scatter)
        self.sums.append(mean * BLOCK_ROWS)
        self.index.append(index)
        if len(self.scatters) > WINDOW:
            self.total -= self.scatters.popleft() + _between(self.sums[0])
            self.total_sum -= self.sums.popleft()
            self.index.popleft()
        self.total += scatter + _between(self.sums[-1])
        self.total_sum += self.sums[-1]
        if self.tally.blocks % 4096 == 0:  # against the drift of a running difference
            self.total = torch.stack(list(self.scatters)).sum(0, dtype=torch.float64)
            for total in self.sums:
                self.total += _between(total)
            self.total_sum = torch.stack(list(self.sums)).sum(0)

    def _window(self) -> bool:
        """Whether the verdict on the last 24 blocks is anything but healthy."""
        tally, reference, limit = self.tally, self.reference, self.limit
        n = WINDOW * BLOCK_ROWS
        mean = self.total_sum / n
        covariance = (self.total - n * torch.outer(mean, mean)) / (n - 1)
        variance = float(covariance.trace())
        participation = variance**2 / float(covariance.square().sum())
        energies = torch.stack([scatter.diagonal() for scatter in self.scatters]).double().mean(0) / BLOCK_ROWS
        sums = band_sums(energies, reference.bands)
        ratios = sums / reference.band_energy
        tail = ratios[self.half :]
        head = float(sums[: self.half].sum() / reference.band_energy[: self.half].sum())
        suspicious = (
            variance < limit["total_variance"]
            or participation < limit["participation_ratio"]
            or head < limit["head_energy_ratio_low"]
            or float(tail.max()) > limit["tail_energy_ratio_high"]
            or float(tail.min()) < BAND_GONE
            or float(tail[-1]) < limit["tail_energy_ratio_low"]
            or (float(mean @ mean) - variance / n) / reference.total_variance > limit["mean_shift_ratio"]
        )
        if tally.blocks % WINDOW == 0:
            tally.ranks += 1
            rank = numerical_rank(torch.linalg.eigvalsh(covariance.float()), reference.noise_floor)
            suspicious |= rank < limit["numerical_rank"]
        if not suspicious:
            return False
        tally.examined += 1
        return self._verdict() != "healthy"

    def _verdict(self) -> str:
        groups = []
        for first in range(0, WINDOW, GROUP):
            moments = Moments(self.reference.dimension, self.reference.mean)
            energies = torch.zeros(self.reference.dimension, dtype=torch.float64)
            for i in range(first, first + GROUP):
                moments.add(self.rows[self.index[i]])
                energies += self.scatters[i].diagonal().double()
            groups.append(Block(0.0, 0.0, moments, energies, norm_histogram(torch.ones(GROUP * BLOCK_ROWS))))
        window = measure(300.0, groups, self.reference, self.reference.dimension)
        return diagnose({300.0: window}, self.reference).state


def _between(total: Tensor) -> Tensor:
    """What a block's sum of rows adds to the scatter about zero."""
    return torch.outer(total, total) / BLOCK_ROWS


def report(tallies: list[Tally], seconds: float) -> str:
    """The table of laws, and the bounds the counts imply."""
    lines = [
        "| law | blocks | pages | in sequential alarm | in a window's | most evidence, log10 | windows examined |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {t.law} | {t.blocks:,} | {t.pages} | {t.sequential} | {t.window} | {t.peak:.1f} | {t.examined} |"
        for t in tallies
    ]
    blocks, pages = sum(t.blocks for t in tallies), sum(t.pages for t in tallies)
    low, high = poisson_bounds(pages)
    lines.append(
        f"\nThe sequential test alarms at an evidence of {math.log10(LEVEL):.0f}. {pages} false pages in {blocks:,} "
        f"healthy blocks: {pages / blocks * 1e6:.2f} a million, 95 % interval "
        f"{low / blocks * 1e6:.2f} to {high / blocks * 1e6:.2f}. At 20 rows a second that is at most "
        f"{high / blocks * BLOCKS_A_YEAR:.1f} pages a replica and year by counting alone. "
        f"{seconds / 60:.0f} minutes of one core."
    )
    return "\n".join(lines)


def poisson_bounds(count: int) -> tuple[float, float]:
    """Exact 95 % bounds of a Poisson mean (Garwood 1936), the limit of Clopper and Pearson's for rare events; one-sided
    above where nothing was seen."""
    if count == 0:
        return 0.0, float(chi2.ppf(0.95, 2) / 2)
    return float(chi2.ppf(0.025, 2 * count) / 2), float(chi2.ppf(0.975, 2 * count + 2) / 2)


def main() -> None:
    """Run the streams, print the counts and the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("models/pretrained/fashion-directclr"))
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file")
    options = parser.parse_args()
    artifact = load(options.encoder)
    if artifact.reference is None or artifact.reference.calibration is None:
        parser.error(f"--encoder: {options.encoder} has no calibrated reference; run python -m training.export on it")
    source = SOURCES[artifact.card.training["data"]]
    test = source.read(source.default, "test")
    assert isinstance(test, ImageSet)
    rows = normalize(Embedder(artifact).embed(test.images))
    started = time.process_time()
    tallies = []
    traffic = Traffic(test.labels, options.seed)
    for law in traffic.laws():
        stream = Stream(artifact.reference, rows, law.__name__)
        wanted = options.blocks // 3
        while stream.tally.blocks < wanted:
            chunk = min(CHUNK, wanted - stream.tally.blocks)
            index = law(chunk * BLOCK_ROWS, stream.tally.blocks * BLOCK_ROWS)
            stream.take(index.view(chunk, BLOCK_ROWS))
            if stream.tally.blocks % (CHUNK * 500) == 0:
                print(stream.tally, f"{time.process_time() - started:.0f} s", flush=True)
        tallies.append(stream.tally)
    text = report(tallies, time.process_time() - started)
    print(text)
    if options.write:
        page = options.write.read_text()
        head, rest = page.split(START)
        options.write.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
