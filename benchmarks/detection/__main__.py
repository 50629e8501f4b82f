"""Faults injected into a real encoder, and harmless traffic: verdicts, rows to detection, false alarms, simple rivals.

    python -m benchmarks.detection --write docs/measured/detection-lists.md
    python -m benchmarks.detection --unseen --write docs/measured/detection-lists.md
    python -m benchmarks.detection --fresh --write docs/measured/detection-lists.md
    python -m benchmarks.detection --forty --no-harm --laws 1 --write docs/measured/detection-lists.md
    python -m benchmarks.detection --preprocessing --encoder models/pretrained/cifar10-directclr \
        --write docs/measured/detection-lists.md
    python -m benchmarks.detection --forty --no-harm --laws 1 --encoder efficientnet-lite0 --source cifar10
    python -m benchmarks.detection --blind --at-end --laws 1 --write docs/measured/detection-lists.md
    python -m benchmarks.detection --crowds --at-end --no-harm --laws 1 --encoder models/pretrained/fashion-byol \
        --other models/pretrained/fashion-directclr --write docs/measured/detection-lists.md
    python -m benchmarks.detection.blocks --blocks 1000000
    python -m benchmarks.detection.summary --write docs/measured/detection.md

Traffic is the Fashion-MNIST test set, which neither the encoder nor its reference and calibration have seen. With
--unseen it is training images, which gave the encoder its gradient but no rule, no reference and no calibration
anything, and the faults are those of `benchmarks.detection.unseen`; with --fresh further images and the faults of
`benchmarks.detection.fresh`; with --forty the test set and those of `benchmarks.detection.forty`, with --blind of
`benchmarks.detection.blind`, with --crowds of `benchmarks.detection.crowds`, where --other is an older encoder. Each
case runs on each law of healthy traffic (independent, sessions of 32 of one class, a class mix that turns in a day) and
starts after a full healthy window at 20 rows a second; monitors with the default block, their clocks advanced by hand,
are read every 256 rows at first, then every 1024. "Found" is the first reading with a state of the right kind, in rows
since the case began. What a model's fault costs: `benchmarks.detection.harm`. An imported --encoder has no images of
its own: --source names the data set of its traffic and of its reference. The rivals see the same window and alarm
beyond their most extreme value on 15 healthy windows.
"""

import argparse
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks._page import write_between
from benchmarks.detection.blind import blind
from benchmarks.detection.cases import Bench, Case, RowsBench
from benchmarks.detection.crowds import crowds
from benchmarks.detection.forty import forty
from benchmarks.detection.fresh import fresh
from benchmarks.detection.harm import BANK, QUERIES, Harm, by_harm
from benchmarks.detection.imported import images_of_source, referenced
from benchmarks.detection.preprocessing import preprocessing
from benchmarks.detection.rivals import rivals
from benchmarks.detection.tables import BLIND, MODES, OFF, ON, Line, counted, kind, listed, waits
from benchmarks.detection.unseen import unseen
from fullrank import SpectrumMonitor
from fullrank.calibration.resample import DAY
from models.artifact import Artifact, load
from models.references import BASIS_ROWS
from tools.demo import COLLAPSED
from training.data import SOURCES, ImageSet, load_split

STEP = 256
# Rows of a case that are read block by block; those after, and healthy ones, come four blocks at a time.
FINE, COARSE = 2048, 1024
LAWS = ("independent", "sessions", "drifting")
TRAINING_PARTS = ("unseen", "fresh", "bank")
# Keys from here on are of content that comes again.
CONTENT = 10**9


@dataclass(frozen=True)
class Outcome:
    """Mode -> the state after the case's window and its reason, and the rows until the first state of the case's kind,
    if any."""

    case: Case
    law: str
    states: dict[str, str]
    reasons: dict[str, str]
    found: dict[str, int | None]


def watch(bench: Bench, case: Case, law: int, n: int, *, at_end: bool = False) -> Outcome:
    """Run a monitor with inputs and one without over a healthy window and then n rows of the case; read them after each
    block until they name the right side (not if `at_end`), and at the end, without the canary and with it."""
    draw, at = bench.traffic.laws()[law], DAY // 7
    now = [0.0]
    found: dict[str, int | None] = dict.fromkeys((OFF, BLIND))
    with ExitStack() as stack:
        monitors = {
            mode: stack.enter_context(SpectrumMonitor(bench.dimension, bench.reference, (300.0,), STEP, lambda: now[0]))
            for mode in (OFF, BLIND)
        }

        def show(rows: Tensor, inputs: Tensor, keys: list[int], rate: float) -> None:
            hashes = np.array(keys, dtype=np.uint64)
            now[0] += len(rows) / rate
            monitors[OFF].observe(rows, hashes, inputs)
            monitors[BLIND].observe(rows, hashes)

        fresh = iter(range(CONTENT))
        for index in torch.split(draw(n, at), COARSE):
            show(bench.clean[index], bench.inputs[index], [next(fresh) for _ in index], bench.usual.rate)
        for monitor in monitors.values():
            monitor.flush()
        drawn = draw(n, at + n) if case.draw is None else case.draw(n)
        shown = 0
        # A step is as many seconds at any rate.
        fine, step, coarse = (int(rows * case.rate / bench.usual.rate) for rows in (FINE, STEP, COARSE))
        for index in (*torch.split(drawn[:fine], step), *torch.split(drawn[fine:], coarse)):
            shown += len(index)
            keys = [CONTENT + row if row in case.keyed else next(fresh) for row in index.tolist()]
            show(case.pool[index], case.inputs[index], keys, case.rate)
            watched = not at_end and case.kind != "none"
            for mode in [mode for mode, rows in found.items() if rows is None and watched]:
                monitors[mode].flush()
                if kind(monitors[mode].snapshot().verdict.state) == case.kind:
                    found[mode] = shown
        for monitor in monitors.values():
            monitor.flush()
        verdicts = {mode: monitor.snapshot().verdict for mode, monitor in monitors.items()}
        monitors[OFF].record_canary(case.canary)
        monitors[OFF].flush()
        verdicts[ON] = monitors[OFF].snapshot().verdict
    states = {mode: verdict.state for mode, verdict in verdicts.items()}
    return Outcome(case, LAWS[law], states, {mode: verdict.reason for mode, verdict in verdicts.items()}, found)


def line_of(outcomes: list[Outcome], alarms: list[str], lost: float) -> Line:
    """A case's outcomes together."""
    case = outcomes[0].case
    return Line(
        case.name,
        case.kind,
        case.strong,
        lost,
        {mode: Counter(outcome.states[mode] for outcome in outcomes) for mode in MODES},
        alarms,
        {mode: [outcome.found[mode] for outcome in outcomes] for mode in outcomes[0].found},
    )


def images_of(artifact: Artifact, which: str) -> ImageSet:
    """Labelled images: "test" images, or of the training images that the reference was not made of those of the
    "unseen" cases, of the "fresh" cases or of the "bank"; these share none."""
    card = artifact.card.training
    if which != "test":
        fit = load_split(card["data"], None, card["held_out"], None, card["seed"]).fit
        assert isinstance(fit, ImageSet)
        rest = fit.take(slice(BASIS_ROWS, None))
        third = len(rest) // 3
        start = third * TRAINING_PARTS.index(which)
        return rest.take(slice(start, start + third))
    source = SOURCES[card["data"]]
    test = source.read(source.default, "test")
    assert isinstance(test, ImageSet)
    return test


def main() -> None:
    """Print the table of cases and the confusion matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("models/pretrained/fashion-directclr"))
    parser.add_argument(
        "--other",
        type=Path,
        default=COLLAPSED,
        help="the encoder served by mistake: a collapsed one, or any of the same shape",
    )
    lists = parser.add_mutually_exclusive_group()
    for name, meaning in (
        ("unseen", "faults and images that the first rules were not made on"),
        ("fresh", "further ones"),
        ("preprocessing", "of preprocessing, of an encoder of colour images"),
        ("forty", "forty more, of which most need no particular architecture"),
        ("blind", "changes of pixels that no rule was made on"),
        ("crowds", "changes of who sends what, and faults beneath them, that no rule was made on"),
    ):
        lists.add_argument(f"--{name}", dest="cases", action="store_const", const=name, default="test", help=meaning)
    parser.add_argument("--rows", type=int, default=6000, help="rows of a case: 6000 are 5 minutes at 20 a second")
    parser.add_argument("--images", type=int, default=10000, help="images to embed")
    parser.add_argument("--laws", type=int, default=3, help="laws of traffic to run each case on")
    parser.add_argument(
        "--rows-of", type=Path, help="with --forty: a file of rows, labels and inputs of another encoder, of numpy's"
    )
    parser.add_argument("--name", default="rows", help="of that encoder")
    parser.add_argument(
        "--source", choices=SOURCES, help="with --forty and an imported --encoder: the data set that is its traffic"
    )
    parser.add_argument(
        "--reference-rows", type=int, help="how many of the file's rows, or of --source's images, make the reference"
    )
    parser.add_argument("--no-harm", dest="harm", action="store_false", help="leave out what each fault costs a search")
    parser.add_argument("--at-end", action="store_true", help="read the monitors at the end only, and leave rivals out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--write", type=Path, help="put the tables between the encoder's marks in this file")
    options = parser.parse_args()
    artifact, other = load(options.encoder), load(options.other)
    name = options.name if options.rows_of else artifact.card.name
    which = options.cases if options.cases in TRAINING_PARTS else "test"
    if options.rows_of:
        bench: Bench = RowsBench(options.rows_of, options.reference_rows)
    elif options.source:
        artifact = referenced(artifact, options.source, options.reference_rows or 2000)
        images = images_of_source(artifact, options.source, "test", options.images)
        bench = Bench(artifact, images.images, images.labels)
    else:
        images = images_of(artifact, which).take(slice(0, options.images))
        bench = Bench(artifact, images.images, images.labels)
    draws = bench.traffic.laws()
    times = () if options.at_end else range(5)
    scores = [rivals(bench, bench.clean[law(options.rows, i * DAY // 5)]) for i in times for law in draws]
    worst = {name: max(score[name] for score in scores) for name in (scores[0] if scores else ())}
    outcomes: list[Outcome] = []
    alarms: dict[str, list[str]] = {}
    written = {
        "test": Bench.cases,
        "unseen": unseen,
        "fresh": fresh,
        "preprocessing": preprocessing,
        "forty": forty,
        "blind": blind,
        "crowds": crowds,
    }
    cases = [case for case in written[options.cases](bench, other) if options.only in case.name]
    for case in cases:
        started = time.monotonic()
        rows = case.pool[(case.draw or bench.traffic.independent)(options.rows)]
        alarms[case.name] = [
            name for name, score in (rivals(bench, rows) if worst else {}).items() if score > worst[name]
        ]
        laws = 1 if case.draw is not None else 3 if case.kind == "none" else options.laws
        for law in range(laws):
            outcomes.append(watch(bench, case, law, options.rows, at_end=options.at_end))
            states, found = outcomes[-1].states.values(), outcomes[-1].found.values()
            print(
                f"{case.name:32} {case.kind:8} {LAWS[law]:12}",
                *states,
                *found,
                f"{time.monotonic() - started:.0f} s",
                *(f"\n    {mode}: {outcomes[-1].reasons[mode]}" for mode in (OFF, ON)),
                flush=True,
            )
    lost = {case.name: math.nan for case in cases}
    costs: list[str] = []
    if options.harm and not options.rows_of and not options.source:
        bank = images_of(artifact, "bank").take(slice(0, BANK))
        harm = Harm(bench, bank, images_of(artifact, "test").take(slice(-QUERIES, None)))
        # Last, because a fault that draws at random draws again.
        lost = {case.name: harm.points(case) for case in cases}
        hits = [(o.case.name, o.found[OFF] is not None) for o in outcomes if o.case.kind == "model"]
        # Read at the end only, nobody knows what was found before.
        costs = [] if options.at_end else [*by_harm(lost, hits, harm.healthy)]
    by_name = {case.name: [outcome for outcome in outcomes if outcome.case.name == case.name] for case in cases}
    lines = [line_of(mine, alarms[name], lost[name]) for name, mine in by_name.items()]
    text = "\n".join([*listed(lines), *counted(lines, waits(lines)), *costs])
    print("\n" + text)
    if options.write:
        name += "" if options.cases == "test" else f", {options.cases}"
        write_between(options.write, f"<!-- {name}: start -->", f"<!-- {name}: end -->", text)


if __name__ == "__main__":
    main()
