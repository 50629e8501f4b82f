"""What watching a fleet costs: series and scrape of a replica, merging a thousand replicas' moments, Ray's collector.

    python -m benchmarks.fleet --replicas 1000 --dimension 768 2048
    python -m benchmarks.fleet --dimension 768 --collected 10 100 1000

Times are CPU seconds of one thread, whatever else the machine does. The replicas of the merge are simulated: a few
different parts, given again and again, each read from the bytes that a replica sends. The series are counted on a real
service, which serves one encoder, then five, then also watches one at /observe.
"""

import argparse
import asyncio
import io
import json
import math
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load, save

from fullrank import Moments, Reference, SpectrumMonitor, measures, merge
from fullrank.merging import Merging
from models import artifact
from scale.collector import Collector
from scale.reports import Report, Watched
from scale.totals import encoders_of, samples_of, to_json
from service.http.app import create_app
from service.settings import PRETRAINED, Settings
from service.watching.peers import Families

ENCODERS = 5
IMAGES = 96  # of each encoder, so that the series that need rows are there
KEY = "a key of the benchmark"
PARTS = 4  # different parts of the simulated fleet


def pattern(seed: int) -> bytes:
    """A small PNG file of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def renamed(folder: Path, number: int) -> str:
    """A copy of the shipped encoder under another name: its folder."""
    original = artifact.load(PRETRAINED / "fashion-directclr")
    copy = replace(original, card=original.card.model_copy(update={"name": f"copy-{number}"}))
    artifact.save(copy, folder / copy.card.name)
    return str(folder / copy.card.name)


async def scrape(settings: Settings, observed: bool, repeats: int = 20) -> tuple[str, float]:
    """The answer to GET /metrics of a real service with those settings, and CPU seconds."""
    app = create_app(settings)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    key = {"Authorization": f"Bearer {KEY}"}
    client = httpx.AsyncClient(transport=transport, base_url="http://it", headers=key, timeout=300)
    async with app.router.lifespan_context(app), client:
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.05)
        for served in app.state.service.in_service():
            images = [("images", (f"{n}.png", pattern(n), "image/png")) for n in range(IMAGES)]
            answer = await client.post("/embed", files=images, params={"model": served.name})
            assert answer.status_code == 200, answer.text
        if observed:
            rows = np.random.default_rng(0).normal(size=(IMAGES, 256)).tolist()
            answer = await client.post("/observe", json={"model": "elsewhere", "rows": rows})
            assert answer.status_code == 202, answer.text
        await asyncio.to_thread(app.state.service.engine.settle, 120)
        for _, _, monitor in app.state.service.monitors():
            await asyncio.to_thread(monitor.flush, 120)
        text = (await client.get("/metrics")).text
        started = time.process_time()
        for _ in range(repeats):
            await client.get("/metrics")
        seconds = (time.process_time() - started) / repeats
    return text, seconds


def series() -> list[Metric]:
    """Print the series of a replica with one encoder and with several; the metrics of the one with one."""
    print(
        "| encoders | series | of the service | of each encoder | bytes | CPU of a scrape, ms |"
        "\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        more = tuple(renamed(Path(folder), number) for number in range(1, ENCODERS))
        base = 0
        plain: list[Metric] = []
        for label, encoders, observed in (("1", (), False), (str(ENCODERS), more, False), ("1, 1 observed", (), True)):
            options: dict[str, Any] = {"encoders": encoders, "threads": 1, "gate": "off"}
            options |= {"api_key": KEY, "monitor_rate": math.inf, "canary_period": 3600}
            settings = Settings(**options)
            text, seconds = asyncio.run(scrape(settings, observed))
            families = list(text_string_to_metric_families(text))
            total = sum(len(it.samples) for it in families)
            plain = plain or families
            base = base or total
            each = (total - base) / (len(encoders) + observed) if encoders or observed else float("nan")
            rest = base - each if encoders else float("nan")
            print(f"| {label} | {total} | {rest:.0f} | {each:.0f} | {len(text)} | {1000 * seconds:.1f} |", flush=True)
    return plain


def report(name: str, monitor: SpectrumMonitor, metrics: list[Metric], groups: int) -> Report:
    """What a replica sends to the collector of scale/, with its moments."""
    snapshot = monitor.snapshot()
    verdict = snapshot.verdict
    watched = Watched(
        "it", "r1", "it@r1", monitor.dimension, monitor.windows, monitor.blocks(groups), verdict.state, verdict.reason,
        monitor.counters.seen, True, None, monitor.reference,
    )  # fmt: skip
    return Report(name, metrics, sorted(encoders_of(samples_of(metrics))), [watched])


def collecting(replicas: int, dimension: int, metrics: list[Metric]) -> None:
    """Print what the collector of a Ray fleet costs, with the metrics of a real replica and moments of a few."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, dimension + 1) ** -0.5

    def rows(count: int) -> torch.Tensor:
        drawn = torch.from_numpy(rng.normal(size=(count, dimension)) * scale).float()
        return torch.nn.functional.normalize(drawn, dim=1)

    reference = Reference.build(rows(2 * dimension), rows(1100))
    reports = []
    for number in range(PARTS):
        with SpectrumMonitor(dimension, reference, (300.0, 3600.0)) as monitor:
            monitor.observe(rows(2 * dimension))
            monitor.flush()
            reports.append(report(str(number), monitor, metrics, 1))
    collector = Collector(lambda: 0.0)  # nobody falls silent, however slow this machine
    steps: list[Callable[[], object]] = [
        lambda: [collector.push(replace(reports[k % PARTS], replica=str(k))) for k in range(replicas)],
        collector.measure,
        lambda: generate_latest(Families(collector.metrics())),
    ]
    seconds = []
    for step in steps:
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    blocks = [block for it in reports[0].watched or () for block in it.blocks]
    held = 8 * sum(tensor.numel() for it in blocks for tensor in it.moments.tensors().values())
    kept = len(json.dumps(to_json(collector.shown())))
    print(
        f"| {dimension} | {replicas} | {held / 1e6:.1f} | {1000 * seconds[0] / replicas:.1f} | {seconds[1]:.1f} "
        f"| {seconds[2]:.2f} | {kept / 1e3:.0f} |",
        flush=True,
    )


def parts(dimension: int) -> list[Moments]:
    """A few replicas' moments about one shift, as replicas of one reference have them."""
    rng = np.random.default_rng(0)
    shift = np.zeros(dimension)
    scale = np.arange(1, dimension + 1) ** -0.5 / dimension**0.5
    return [
        Moments(dimension, shift).add(torch.from_numpy(rng.normal(size=(2 * dimension, dimension)) * scale))
        for _ in range(PARTS)
    ]


def cost(count: int, bodies: list[bytes], one_by_one: bool) -> tuple[Moments, float]:
    """Merge so many replicas from their bytes; the result, and CPU seconds."""
    dimension = load(bodies[0])["sum"].numel()
    started = time.process_time()
    if one_by_one:
        merging = Merging(dimension)
        for index in range(count):
            merging.add(load(bodies[index % len(bodies)]))
        total = merging.total()
    else:
        total = merge(Moments.from_tensors(load(bodies[index % len(bodies)])) for index in range(count))
    return total, time.process_time() - started


def merging(replicas: int, dimension: int, plain: int) -> None:
    """Print what merging costs, packed and one by one, and unpacked all at once (of `plain` replicas)."""
    some = parts(dimension)
    packed, whole = ([save(it.tensors(packed=form)) for it in some] for form in (True, False))
    total, seconds = cost(replicas, packed, True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    expected = sum(it.count for it in some) / len(some) * replicas
    assert abs(total.count - expected) < sum(it.count for it in some)
    started = time.process_time()
    measures.spectrum(total.covariance())
    rank = time.process_time() - started
    _, before = cost(plain, whole, False)
    print(
        f"| {dimension} | {len(packed[0]) / 1e6:.1f} | {len(whole[0]) / 1e6:.1f} | {1000 * seconds / replicas:.1f} "
        f"| {seconds:.1f} | {1000 * before / plain:.1f} | {rank:.2f} | {memory:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--plain", type=int, default=20, help="replicas merged unpacked, all held at once")
    parser.add_argument("--dimension", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--collected", type=int, nargs="+", default=[10, 100], help="replicas of a Ray fleet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.replicas} replicas, CPU of one thread:\n")
    print(
        "| dimension | packed, MB | unpacked, MB | merge packed one by one, ms each | of all, s "
        "| merge unpacked at once, ms each | eigenvalues, s | peak memory, GiB |\n|---|---|---|---|---|---|---|---|"
    )
    for dimension in options.dimension:
        merging(options.replicas, dimension, options.plain)
    print()
    metrics = series()
    print(
        "\n| dimension | replicas | moments of a report, MB | a report, ms | measuring, s | a scrape, s | kept, kB |"
        "\n|---|---|---|---|---|---|---|"
    )
    for dimension in options.dimension:
        for replicas in options.collected:  # each needs its moments' memory
            collecting(replicas, dimension, metrics)


if __name__ == "__main__":
    main()
