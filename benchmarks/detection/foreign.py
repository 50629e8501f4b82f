"""Drift detectors of other projects beside the monitor: Evidently's of embeddings, and alibi-detect's MMD and LSDD.

    python -m benchmarks.detection.foreign --dump windows.npz
    python -m venv rivals && rivals/bin/pip install alibi-detect==0.13.0 evidently==0.7.23 torch==2.13.0
    rivals/bin/python -m benchmarks.detection.foreign --judge windows.npz --write docs/measured/detection.md

The first command draws the windows of the forty cases; the last runs in an environment with the detectors, which do not
install beside ours. Each detector has its defaults (but 20 permutations of alibi-detect's MMD), 1,000 healthy rows as
its reference and windows of 500 rows, which share no image with them. Healthy windows are judged as well: an alarm
there is false.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._page import write_between

REFERENCE, WINDOW, HEALTHY = 1000, 500, 40
# Of alibi-detect's MMD: with its default, 100, a window costs 1.5 CPU seconds. The level of 5 % is the same.
PERMUTATIONS = 20
Rows = NDArray[np.float32]
Alarm = Callable[[Rows], bool]
KINDS = {
    "model": "faults of the model",
    "traffic": "other traffic",
    "none": "harmless changes",
    "healthy": "healthy windows",
}


def dump(encoder: Path, other: Path, to: Path) -> None:
    """Write the reference, healthy windows and one window of each case."""
    from benchmarks.detection.__main__ import images_of
    from benchmarks.detection.cases import Bench
    from benchmarks.detection.forty import forty
    from models.artifact import load

    artifact = load(encoder)
    images = images_of(artifact, "test").take(slice(0, 2 * REFERENCE))
    bench = Bench(artifact, images.images, images.labels)
    generator = torch.Generator().manual_seed(0)
    windows, names = [], []
    for case in forty(bench, load(other)):
        index = REFERENCE + torch.randperm(REFERENCE, generator=generator)[:WINDOW]
        windows.append(case.pool[index if case.draw is None else case.draw(WINDOW)])
        names.append([case.name, case.kind])
    for _ in range(HEALTHY):
        windows.append(bench.clean[REFERENCE + torch.randperm(REFERENCE, generator=generator)[:WINDOW]])
        names.append(["healthy", "healthy"])
    np.savez(
        to, reference=bench.clean[:REFERENCE].numpy(), windows=torch.stack(windows).numpy(), names=json.dumps(names)
    )


def detectors(reference: Rows) -> dict[str, Alarm]:
    """Name -> whether the detector calls a window drifted, at its defaults."""
    import pandas  # type: ignore[import-untyped,unused-ignore]
    from alibi_detect.cd import LSDDDrift, MMDDrift  # type: ignore[import-not-found,unused-ignore]
    from evidently.legacy.metrics.data_drift import (  # type: ignore[import-not-found,unused-ignore]
        embedding_drift_methods as evidently,
    )

    frame = pandas.DataFrame(reference)  # copied for each call: they add a column to it

    def of_evidently(method: Callable[..., tuple[float, bool, str]]) -> Alarm:
        return lambda rows: bool(method(pandas.DataFrame(rows), frame.copy())[1])

    def of_alibi(drift: Callable[[Rows], dict[str, dict[str, int]]]) -> Alarm:
        return lambda rows: bool(drift(rows)["data"]["is_drift"])

    return {
        "Evidently, domain classifier": of_evidently(evidently.model()),
        "Evidently, Euclidean distance": of_evidently(evidently.distance()),
        "Evidently, MMD": of_evidently(evidently.mmd()),
        "Evidently, share of drifted components": of_evidently(evidently.ratio()),
        "alibi-detect, MMD": of_alibi(
            MMDDrift(reference, backend="pytorch", p_val=0.05, n_permutations=PERMUTATIONS).predict
        ),
        "alibi-detect, LSDD": of_alibi(LSDDDrift(reference, backend="pytorch", p_val=0.05).predict),
    }


def judge(file: Path) -> Iterator[str]:
    """The table: at how many windows of each kind each detector alarms."""
    with np.load(file) as arrays:
        reference, windows = arrays["reference"], arrays["windows"]
        names: list[list[str]] = json.loads(str(arrays["names"]))
    cases = [it for it in range(len(names)) if names[it] != ["healthy", "none"]]
    totals = {kind: sum(names[it][1] == kind for it in cases) for kind in KINDS}
    yield "| detector | " + " | ".join(KINDS.values()) + " | CPU seconds a window |"
    yield "|---" * (len(KINDS) + 2) + "|"
    for name, alarms in detectors(reference).items():
        np.random.seed(0)
        torch.manual_seed(0)
        started = time.process_time()
        found = dict.fromkeys(KINDS, 0)
        for it in cases:
            found[names[it][1]] += alarms(windows[it])
        spent = (time.process_time() - started) / len(cases)
        cells = [f"{found[kind]} of {totals[kind]}" for kind in KINDS]
        yield f"| {name} | " + " | ".join(cells) + f" | {spent:.2f} |"


def main() -> None:
    """Draw the windows, or judge them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("models/pretrained/fashion-directclr"))
    parser.add_argument("--other", type=Path, default=Path("models/pretrained/fashion-byol"))
    parser.add_argument("--dump", type=Path, help="write the windows here")
    parser.add_argument("--judge", type=Path, help="judge these windows")
    parser.add_argument("--write", type=Path, help="put the table between its marks in this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.dump:
        dump(options.encoder, options.other, options.dump)
    if options.judge:
        lines = []
        for line in judge(options.judge):
            print(line, flush=True)
            lines.append(line)
        if options.write:
            write_between(options.write, "<!-- foreign: start -->", "<!-- foreign: end -->", "\n".join(lines))


if __name__ == "__main__":
    main()
