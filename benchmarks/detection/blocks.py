"""False alarms on a million healthy blocks, resampled from embeddings that the calibration has not seen.

    python -m benchmarks.detection.blocks --blocks 1000000 --write docs/explanation/statistics.md

Each block is 256 rows of the Fashion-MNIST test set drawn afresh by one of the laws of healthy traffic, a third of the
blocks each, in unbroken streams. Two things can page: the sequential test, whose bets are the library's and which sees
every block, and the verdict on the window of the last 24 blocks. Each window's estimates, the participation ratio's by
a lower bound, are compared with the thresholds; an alarm needs the jackknife bound beyond the threshold, hence the
estimate too, so where no estimate is, the verdict is healthy without being computed. Windows with an estimate
beyond a threshold are handed to the library whole. The numerical rank is checked on every 24th window: disjoint,
together all rows. Inputs and the canary are left out: they only change what an alarm is called.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import chi2  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks._page import write_between
from fullrank import Reference, profile
from fullrank.calibration.ranges import BLOCK_ROWS
from fullrank.calibration.resample import Traffic, columns
from fullrank.calibration.sequential import LEVEL, Detector
from fullrank.measures import numerical_rank
from fullrank.moments import Moments
from fullrank.monitor.window import Block
from fullrank.profile import band_sums
from fullrank.statistics import measure, norm_histogram
from fullrank.verdict import BAND_GONE, diagnose, thresholds
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
        self.detector, self.checked = Detector(reference), Detector(reference)
        self.limit = thresholds(reference, WINDOW * BLOCK_ROWS)
        self.half = profile.head_bands(len(reference.bands))
        d = reference.dimension
        self.index = torch.zeros(0, BLOCK_ROWS, dtype=torch.int64)
        self.scatters = torch.zeros(0, d, d)
        self.means = torch.zeros(0, d, dtype=torch.float64)
        self.alarmed = False
        self.tally = Tally(law)

    def take(self, index: Tensor) -> None:
        """Blocks of rows (c, 256) in order. Kept from before: as many as a window reaches back."""
        blocks = self.projected[index]
        means = blocks.mean(1)
        centred = (blocks - means[:, None]) * math.sqrt(BLOCK_ROWS / (BLOCK_ROWS - 1))
        before = len(self.index)
        self.index = torch.cat((self.index, index))
        self.means = torch.cat((self.means, means.double()))
        self.scatters = torch.cat((self.scatters, torch.bmm(centred.transpose(1, 2), centred)))
        flat = self.scatters.flatten(1)
        products = (flat @ flat.T).double()  # of all pairs of blocks at hand
        energies = self.scatters.diagonal(dim1=1, dim2=2).double() / BLOCK_ROWS
        alarms = self._sequential(energies[before:], products, before)
        wrong = self._windows(energies, products, before)
        tally = self.tally
        for alarm, other in zip(alarms, wrong, strict=True):
            tally.pages += (alarm or other) and not self.alarmed
            self.alarmed = alarm or other
        tally.blocks += len(index)
        tally.sequential += sum(alarms)
        tally.window += sum(wrong)
        self.index, self.means, self.scatters = (
            kept[1 - WINDOW :].clone() for kept in (self.index, self.means, self.scatters)
        )

    def _sequential(self, energies: Tensor, products: Tensor, before: int) -> list[bool]:
        """Whether the e-detector alarms at each block: `Detector.bet` for many, checked against it at the start."""
        reference, detector = self.reference, self.detector
        traces = products.new_tensor([float(s.trace()) for s in self.scatters])
        ratio = traces[1:] * traces[:-1] / products.diagonal(1) / reference.participation_ratio
        participation = torch.cat((torch.full((1,), math.nan, dtype=torch.float64), ratio.log()))[before:]
        statistics = torch.stack(
            [
                # The mean's distance is the same in any orthonormal basis.
                columns(reference, energy, mean + reference.mean, BLOCK_ROWS, {"participation_ratio": float(log)})
                for energy, mean, log in zip(energies, self.means[before:], participation, strict=True)
            ]
        )[:, detector.columns]
        evalues = detector.evalues(statistics).transpose(0, 1).numpy()
        wealth, path = detector.wealth.numpy(), []
        for evalue in evalues:
            wealth = np.minimum(np.maximum(wealth, 0) + evalue, detector.most)
            path.append(wealth)
        detector.wealth = torch.from_numpy(wealth)
        if self.tally.blocks == 0:
            for row in statistics:
                self.checked.bet(row, 0.0)
            torch.testing.assert_close(self.checked.wealth, detector.wealth)
        logs = np.logaddexp.reduce(np.stack(path).reshape(len(path), -1), 1) - math.log(wealth.size)
        self.tally.peak = max(self.tally.peak, float(logs.max()) / math.log(10))
        return [bool(alarm) for alarm in logs >= math.log(LEVEL)]

    def _windows(self, energies: Tensor, products: Tensor, before: int) -> list[bool]:
        """Whether the verdict on the window ending with each new block is anything but healthy."""
        reference, limit, n = self.reference, self.limit, WINDOW * BLOCK_ROWS
        first = max(0, before + 1 - WINDOW)
        if len(self.index) - first < WINDOW:
            return [False] * (len(self.index) - before)
        sums = torch.stack([band_sums(energy, reference.bands) for energy in energies[first:]])
        ratios = sums.unfold(0, WINDOW, 1).mean(2) / reference.band_energy
        means = self.means[first:].unfold(0, WINDOW, 1)  # (w, d, 24)
        mean = means.mean(2)
        within = torch.stack(
            [products[i : i + WINDOW, i : i + WINDOW].sum() for i in range(first, first + len(ratios))]
        )
        spread = means - mean[:, :, None]
        between = (spread.transpose(1, 2) @ spread).square().sum((1, 2)) * BLOCK_ROWS**2
        total = sums.sum(1).unfold(0, WINDOW, 1).mean(1) + spread.square().sum((1, 2)) / WINDOW
        # The triangle inequality: the norm of the window's scatter is at most that within and that between blocks.
        participation = (total * n / (within.sqrt() + between.sqrt())).square()
        tail, head = ratios[:, self.half :], (ratios * reference.band_energy)[:, : self.half].sum(1)
        suspicious = (
            (total < limit["total_variance"])
            | (participation < limit["participation_ratio"])
            | (head / reference.band_energy[: self.half].sum() < limit["head_energy_ratio_low"])
            | (tail.amax(1) > limit["tail_energy_ratio_high"])
            | (tail.amin(1) < BAND_GONE)
            | (tail[:, -1] < limit["tail_energy_ratio_low"])
            | ((mean.square().sum(1) - total / n) / reference.total_variance > limit["mean_shift_ratio"])
        )
        for i in range(len(suspicious)):
            if (self.tally.blocks + i) % WINDOW == 0:
                self.tally.ranks += 1
                # Without the part between blocks: it only adds.
                scatter = self.scatters[first + i : first + i + WINDOW].sum(0) / n
                suspicious[i] |= (
                    numerical_rank(torch.linalg.eigvalsh(scatter), reference.noise_floor) < limit["numerical_rank"]
                )
        self.tally.examined += int(suspicious.sum())
        wrong = [bool(odd) and self._verdict(first + i) != "healthy" for i, odd in enumerate(suspicious)]
        return [False] * (len(self.index) - before - len(wrong)) + wrong

    def _verdict(self, start: int) -> str:
        groups = []
        for first in range(start, start + WINDOW, GROUP):
            moments = Moments(self.reference.dimension, self.reference.mean)
            energies = torch.zeros(self.reference.dimension, dtype=torch.float64)
            for i in range(first, first + GROUP):
                moments.add(self.rows[self.index[i]])
                energies += self.scatters[i].diagonal().double()
            groups.append(Block(0.0, 0.0, moments, energies, norm_histogram(torch.ones(GROUP * BLOCK_ROWS))))
        window = measure(300.0, groups, self.reference, self.reference.dimension)
        return diagnose({300.0: window}, self.reference).state


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
    traffic = Traffic(test.labels, options.seed)
    streams = [(law, Stream(artifact.reference, rows, law.__name__)) for law in traffic.laws()]
    tallies = [stream.tally for _, stream in streams]
    for chunk in range(math.ceil(options.blocks / 3 / CHUNK)):
        for law, stream in streams:
            index = law(CHUNK * BLOCK_ROWS, stream.tally.blocks * BLOCK_ROWS)
            stream.take(index.view(CHUNK, BLOCK_ROWS))
        if chunk % 100 == 99:
            print(report(tallies, time.process_time() - started), flush=True)
    text = report(tallies, time.process_time() - started)
    print(text)
    if options.write:
        write_between(options.write, START, END, text)


if __name__ == "__main__":
    main()
