"""False alarms on a million healthy blocks, resampled from embeddings that the calibration has not seen.

    python -m benchmarks.detection.blocks --blocks 1000000 --write docs/measured/detection-lists.md
    python -m benchmarks.detection.blocks --blocks 1000000 --rows rows.npz --name efficientnet-lite0

A block is 256 rows of the test set: four runs of 64, drawn from 4,800 runs of a law of healthy traffic. There are five
laws (`benchmarks.detection.runs`), a fifth of the blocks each, in 32 unbroken streams that begin at different times of
the day; calibration knows three of them. Two things can page: the sequential test, whose bets are the library's and
which sees every block, and the verdict on the window of the last 24 blocks. Each window's estimates are compared with
the thresholds; an alarm needs a bound beyond one, hence the estimate too, so where no estimate is, the verdict is
healthy without being computed. Windows with an estimate beyond a threshold are handed to the library whole, and so is
one of each law, for what needs eigenvalues. Of the products of two directions, those behind the 48 leading ones are
left out. Inputs and the canary are left out too: they only change what an alarm is called.

--rows: a file of numpy's with `rows` (n, d), `labels` (n,) and `inputs` (n, k), for an encoder that is not in the
repository. One half of them, or --reference-rows, makes its reference, the other half is the traffic.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from scipy.stats import beta  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks._page import write_between
from benchmarks.detection.cases import RowsBench
from benchmarks.detection.runs import laws
from benchmarks.detection.streams import LANES, STEPS, Streams, Tally
from fullrank import Reference
from fullrank.calibration.ranges import BLOCK_ROWS
from fullrank.calibration.sequential import LEVEL
from fullrank.descriptors import describe
from models.artifact import load
from models.embedder import Embedder, normalize
from training.data import SOURCES, ImageSet

RUNS = 4800
# An encoder's name and reference, and its unit rows (n, d), their classes (n,) and their inputs' descriptors (n, k).
Source = tuple[str, Reference, Tensor, Tensor, Tensor]
BLOCKS_A_YEAR = 365.25 * 86_400 * 20 / BLOCK_ROWS


def report(tallies: list[Tally], seconds: float) -> str:
    """The table of laws, and the bounds the counts imply."""
    lines = [
        "| law | blocks | pages | in sequential alarm | in a window's | most evidence, log10 | windows asked about |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {t.law} | {t.blocks:,} | {t.pages} | {t.sequential} | {t.window} | {t.peak:.1f} | {t.asked} |"
        for t in tallies
    ]
    blocks, pages = sum(t.blocks for t in tallies), sum(t.pages for t in tallies)
    low, high = binomial_bounds(pages, blocks)
    lines.append(
        f"\nThe sequential test alarms at an evidence of {math.log10(LEVEL):.0f}. {pages} false pages in {blocks:,} "
        f"healthy blocks: {pages / blocks * 1e6:.2f} a million, 95 % interval {low * 1e6:.2f} to {high * 1e6:.2f}. At "
        f"20 rows a second that is at most {high * BLOCKS_A_YEAR:.1f} pages a replica and year by counting alone. "
        f"{seconds:.0f} CPU seconds."
    )
    return "\n".join(lines)


def binomial_bounds(count: int, trials: int) -> tuple[float, float]:
    """Exact 95 % bounds of a probability (Clopper and Pearson 1934); one-sided above where nothing was seen."""
    if count == 0:
        return 0.0, float(beta.ppf(0.95, 1, trials))
    return float(beta.ppf(0.025, count, trials - count + 1)), float(beta.ppf(0.975, count + 1, trials - count))


def of_artifact(folder: Path) -> Source:
    """Its name and reference, and its unit rows of the test images, their classes and descriptors."""
    artifact = load(folder)
    if artifact.reference is None or artifact.reference.calibration is None:
        raise SystemExit(f"--encoder: {folder} has no calibrated reference; run python -m training.export on it")
    source = SOURCES[artifact.card.training["data"]]
    test = source.read(source.default, "test")
    assert isinstance(test, ImageSet)
    rows = normalize(Embedder(artifact).embed(test.images))
    inputs = torch.from_numpy(describe(test.images.numpy()))
    return artifact.card.name, artifact.reference, rows, test.labels, inputs


def light(reference: Reference, inputs: Tensor) -> Tensor:
    """(n,) how light images are, from their descriptors (n, k): the mean of the thumbnail."""
    assert reference.inputs is not None
    return inputs[:, : reference.inputs.width].mean(1)


def of_rows(file: Path, name: str, reference_rows: int | None) -> Source:
    """The same of the rows in a file: a reference built from the first of them, and the other half."""
    bench = RowsBench(file, reference_rows)
    return name, bench.reference, bench.clean, bench.traffic.labels, bench.inputs


def chosen(text: str, counted: str, count: int) -> tuple[argparse.Namespace, Source]:
    """The command line of a benchmark on healthy traffic, which counts so many by default, and what it chooses."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("models/pretrained/fashion-directclr"))
    parser.add_argument("--rows", type=Path, help="a file of rows instead of an encoder")
    parser.add_argument("--name", default="rows", help="of the encoder that the rows are of")
    parser.add_argument("--reference-rows", type=int, help="how many of the file's rows make its reference")
    parser.add_argument(counted, type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the table between the encoder's marks in this file")
    options = parser.parse_args()
    if options.rows is None:
        return options, of_artifact(options.encoder)
    return options, of_rows(options.rows, options.name, options.reference_rows)


def main() -> None:
    """Run the streams, print the counts and the bounds."""
    options, (name, reference, rows, labels, inputs) = chosen(__doc__, "--blocks", 1_000_000)
    started = time.process_time()
    drawn = laws(reference, rows, labels, light(reference, inputs), RUNS, options.seed)
    streams = [Streams(reference, law, rows, options.seed) for law in drawn]
    for turn in range(math.ceil(options.blocks / (len(streams) * LANES * STEPS))):
        for stream in streams:
            stream.take()
        if turn % 10 == 9:
            print(report([stream.tally for stream in streams], time.process_time() - started), flush=True)
    text = report([stream.tally for stream in streams], time.process_time() - started)
    print(text)
    if options.write:
        write_between(options.write, f"<!-- {name}, blocks: start -->", f"<!-- {name}, blocks: end -->", text)


if __name__ == "__main__":
    main()
