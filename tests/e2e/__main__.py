"""Every way of going wrong, from an image to a notification: which alert comes, which does not, how long it takes.

    python -m tests.e2e [--scenario NAME ...] [--json FILE]

Two real replicas, a real Prometheus and Alertmanager with the shipped rules and configuration, and a webhook, on
loopback. Time is shortened by configuration, nothing else is changed: the services watch 20 and 60 seconds, which are
relabelled to 5m and 1h, and every `for`, range and wait is a fifteenth. Prints a table; exit code 1 if anything that
should have come did not, or anything came that should not.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.artifact import WEIGHTS, load, save
from tests.e2e.replica import Replica
from tests.e2e.scenarios import SCENARIOS, Seen, World
from tests.support.alertmanager import Webhook, alertmanager
from tests.support.hurry import sped_up_rules
from tools.demo import COLLAPSED, PRETRAINED
from tools.demo.traffic import encoded
from tools.stack import StackError, prometheus, prometheus_binary
from training.data import SAMPLE, read_fashion_mnist

WINDOWS = {"20s": "5m", "1m": "1h"}
TROUSERS = 1

console = Console(highlight=False, soft_wrap=True)


def encoders(folder: Path) -> Path:
    """A folder of encoders: the shipped ones, one with a damaged weight file, one with other weights and hashes."""
    shutil.copytree(COLLAPSED, folder / COLLAPSED.name)
    shutil.copytree(PRETRAINED / "fashion-directclr", folder / "fashion-directclr")
    shutil.copytree(PRETRAINED / "fashion-directclr", folder / "damaged")
    weights = folder / "damaged" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    healthy = load(PRETRAINED / "fashion-directclr")
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for name, parameter in healthy.encoder.named_parameters():
            if name.startswith("layer3"):
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=float(parameter.std()))
    save(replace(healthy, card=healthy.card.model_copy(update={"name": "altered"})), folder / "altered")
    return folder


def pictures() -> tuple[list[str], list[str]]:
    """1,000 test images of all kinds, and as many of trousers only: some flipped, some moved by a pixel."""
    everything, more = (read_fashion_mnist(SAMPLE, which) for which in ("test", "train"))
    images = torch.cat([it.images[it.labels == TROUSERS] for it in (everything, more)])
    moved = [torch.roll(it, shift, 3) for it in (images, images.flip(3)) for shift in (-1, 0, 1)]
    return encoded(everything.images), encoded(_shuffled(torch.cat(moved)))


def _shuffled(images: Tensor) -> Tensor:
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def run(names: list[str], folder: Path) -> dict[str, Seen]:
    """What came of each scenario. Raises StackError when a part does not come up."""
    prometheus_binary()
    everything, narrow = pictures()
    root = encoders(folder / "encoders")
    settings: dict[str, object] = {"encoder": root / "fashion-directclr", "encoders_dir": root, "windows": "20,60"}
    settings |= {"block_rows": 64, "threads": 1, "canary_period": 5, "state_period": 1}
    a = Replica(folder, settings | {"state_dir": folder / "state-a"})
    b = Replica(folder, settings | {"state_dir": folder / "state-b", "canary_min_cosine": 1e-6})
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        webhook = stack.enter_context(Webhook())
        for replica in (a, b):
            stack.callback(replica.stop)
            replica.start()
        manager = stack.enter_context(alertmanager(folder, webhook.url))
        rules = sped_up_rules(folder / "rules")
        server = stack.enter_context(
            prometheus(folder, [a.address, b.address], windows=WINDOWS, alertmanagers=[manager], rules=rules)
        )
        world = World(a, b, server, webhook, manager, everything, narrow)
        for name in names:
            started = time.monotonic()
            try:
                world.reset(a, b)
                seen[name] = SCENARIOS[name].play(world)
            except StackError as error:
                seen[name] = Seen(False, str(error), time.monotonic() - started)
            it = seen[name]
            console.print(
                f"{'ok  ' if it.passed else 'FAIL'} {name:<16} {time.monotonic() - started:5.0f} s  {it.words}"
            )
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="write the table as JSON to this file")
    parser.add_argument("--keep", type=Path, help="keep logs and configurations in this new folder")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fullrank-e2e-") as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            seen = run(arguments.scenario or list(SCENARIOS), folder)
        except StackError as error:
            console.print(str(error), style="red", markup=False)
            return 1
    table = Table("scenario", "expected", "seen", "seconds", title="from an image to a notification")
    for name, it in seen.items():
        colour = "green" if it.passed else "red"
        table.add_row(name, SCENARIOS[name].expected, f"[{colour}]{it.words}[/{colour}]", f"{it.seconds:.0f}")
    console.print(table)
    console.print(
        f"{sum(it.passed for it in seen.values())} of {len(seen)} as expected, {time.monotonic() - started:.0f} s"
    )
    if arguments.json:
        rows = {name: asdict(it) | {"expected": SCENARIOS[name].expected} for name, it in seen.items()}
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(it.passed for it in seen.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
