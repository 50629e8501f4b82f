"""Faults injected into a real encoder, and harmless traffic: verdicts, rows to detection, false alarms, simple rivals.

    python -m benchmarks.detection --encoder models/pretrained/fashion-directclr --rows 6000 --null-windows 200

Traffic is the Fashion-MNIST test set, which neither the encoder nor its reference has seen. Each fault starts after a
full healthy window at 20 rows a second; a monitor with the default windows watches, its clock advanced by hand, and
is read every 256 rows. "Found" is the first reading with the state the case calls for, in rows since the fault began.
The rivals see the same window, against their most extreme value on healthy windows.
"""

import argparse
import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fullrank import Reference, SpectrumMonitor, measures
from models.artifact import Artifact, load
from models.embedder import Embedder
from models.embedder import normalize as unit
from training.data import SOURCES

RATE, STEP = 20.0, 256
MODEL = ("model_fault", "complete_collapse", "dimensional_collapse")
TRAFFIC = ("traffic_narrowed", "traffic_shifted")
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What goes wrong: `kind` is model, traffic or none; rows(n) draws n embeddings of it; canary: the canary's now."""

    name: str
    kind: str
    rows: Callable[[int], Tensor]
    canary: Tensor


class Bench:
    """The encoder, its test-set embeddings by class, and ways to change both."""

    def __init__(self, artifact: Artifact, images: Tensor, labels: Tensor) -> None:
        assert artifact.reference is not None
        assert artifact.canary is not None
        self.artifact, self.images, self.labels = artifact, images, labels
        self.reference: Reference = artifact.reference
        self.canary_images = artifact.canary.images
        self.generator = torch.Generator().manual_seed(0)
        self.clean = unit(Embedder(artifact).embed(images))
        self.canary = unit(Embedder(artifact).embed(self.canary_images))
        self.dimension = self.clean.shape[1]

    def draw(self, pool: Tensor, n: int) -> Tensor:
        """n rows of a pool: different ones as far as it goes."""
        if n <= len(pool):
            return pool[torch.randperm(len(pool), generator=self.generator)[:n]]
        return pool[torch.randint(len(pool), (n,), generator=self.generator)]

    def sessions(self, n: int) -> Tensor:
        """Runs of 32 rows of one class."""
        classes = torch.randint(10, (math.ceil(n / 32),), generator=self.generator)
        return torch.cat([self.draw(self.clean[self.labels == c], 32) for c in classes])[:n]

    def drift(self, n: int) -> Tensor:
        """A class mix that turns by half of its range over the rows."""
        weights = torch.linspace(0, math.pi, n)[:, None] + torch.arange(10) * (2 * math.pi / 10)
        classes = torch.multinomial(1 + 0.5 * weights.sin(), 1, generator=self.generator).flatten()
        rows = torch.empty(n, self.dimension)
        for c in range(10):
            rows[classes == c] = self.draw(self.clean[self.labels == c], int((classes == c).sum()))
        return rows

    def changed(self, name: str, kind: str, change: Change) -> Case:
        """A fault in the representation itself, in the canary's too."""
        pool, canary = unit(change(self.clean)), unit(change(self.canary))
        return Case(name, kind, lambda n: self.draw(pool, n), canary)

    def forwarded(self, name: str, embed: Callable[[Tensor], Tensor]) -> Case:
        """A fault in the model or before it: images embedded another way, the canary's too."""
        pool = unit(embed(self.images))
        return Case(name, "model", lambda n: self.draw(pool, n), unit(embed(self.canary_images)))

    def traffic(self, name: str, kind: str, rows: Callable[[int], Tensor]) -> Case:
        """Other images, the model intact."""
        return Case(name, kind, rows, self.canary)

    def damaged(self, share: float) -> Embedder:
        """A share of all convolution weights set to zero."""
        artifact = copy.deepcopy(self.artifact)
        for parameter in artifact.encoder.parameters():
            if parameter.ndim == 4:
                lost = torch.rand(parameter.shape, generator=self.generator) < share
                parameter.data[lost] = 0
        return Embedder(artifact)

    def quantised(self, bits: int) -> Embedder:
        """Convolution weights rounded to a symmetric grid per output channel."""
        artifact = copy.deepcopy(self.artifact)
        for parameter in artifact.encoder.parameters():
            if parameter.ndim == 4:
                step = parameter.data.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
                parameter.data = (parameter.data / step).round() * step
        return Embedder(artifact)

    def cases(self, collapsed: Artifact | None) -> list[Case]:
        """Every fault and every harmless change."""
        d, clean = self.dimension, self.clean
        embedder = Embedder(self.artifact)
        basis, mean = self.reference.basis.float(), self.reference.mean.float()
        turned = torch.linalg.qr(torch.randn(d, d, generator=self.generator)).Q
        order = torch.randperm(d, generator=self.generator)

        def project(frame: Tensor) -> Change:
            return lambda rows: rows @ frame @ frame.T

        def dead(share: float) -> Change:
            alive = torch.ones(d)
            alive[order[: int(share * d)]] = 0
            return lambda rows: rows * alive

        def near_duplicates(n: int) -> Tensor:
            few = self.draw(clean, 600)
            return self.draw(few, n) + 0.005 / math.sqrt(d) * torch.randn(n, d, generator=self.generator)

        def hot(n: int) -> Tensor:
            rows = self.draw(clean, n)
            rows[torch.rand(n, generator=self.generator) < 0.1] = clean[0]
            return rows

        model = [
            *(self.changed(f"principal rank {d // k}", "model", project(basis[:, : d // k])) for k in (2, 4, 8)),
            *(self.changed(f"random rank {d // k}", "model", project(turned[:, : d // k])) for k in (2, 4, 8)),
            *(self.changed(f"{share:.0%} of units dead", "model", dead(share)) for share in (0.1, 0.3, 0.5)),
            self.changed("shrunk to 1/20 about the mean", "model", lambda rows: mean + (rows - mean) / 20),
            self.changed("mean shift of 2", "model", lambda rows: rows + 2 * basis[:, 0]),
            *(self.forwarded(f"{share:.0%} of weights zeroed", self.damaged(share).embed) for share in (0.1, 0.4)),
            self.forwarded("pixels inverted", lambda images: embedder.embed(255 - images)),
            self.forwarded("pixels a tenth", lambda images: embedder.embed(images // 10)),
            self.forwarded("4-bit weights", self.quantised(4).embed),
        ]
        if collapsed is not None:
            model.append(self.forwarded("collapsed encoder", Embedder(collapsed).embed))
        # Smooth random fields: images, but not of clothes.
        noise = torch.rand(len(self.images), *self.images.shape[1:2], 5, 5, generator=self.generator)
        fields = torch.nn.functional.interpolate(noise, self.images.shape[-2:], mode="bicubic").clamp(0, 1)
        foreign = unit(embedder.embed((fields * 255).to(torch.uint8)))

        def only(c: int) -> Case:
            return self.traffic(f"class {c} only", "traffic", lambda n: self.draw(clean[self.labels == c], n))

        traffic = [
            *(only(c) for c in (0, 1, 5, 8)),
            self.traffic("foreign images", "traffic", lambda n: self.draw(foreign, n)),
            self.traffic("half foreign", "traffic", lambda n: self.draw(torch.cat((foreign, clean)), n)),
        ]
        harmless = [
            self.traffic("iid", "none", lambda n: self.draw(clean, n)),
            self.traffic("sessions of 32", "none", self.sessions),
            self.traffic("class mix drifts", "none", self.drift),
            self.traffic("10 % one hot image", "none", hot),
            self.traffic("600 images, near-duplicates", "none", near_duplicates),
            self.forwarded("bfloat16", Embedder(self.artifact, dtype=torch.bfloat16).embed),
            self.forwarded("8-bit weights", self.quantised(8).embed),
        ]
        return [*model, *traffic, *(Case(c.name, "none", c.rows, c.canary) for c in harmless)]


def watch(bench: Bench, case: Case, n: int) -> tuple[str, str, int | None]:
    """The last state without the canary and with it, and the rows of the case until the first state it calls for."""
    now = [0.0]
    wanted = {"model": MODEL, "traffic": TRAFFIC, "none": (*MODEL, *TRAFFIC)}[case.kind]
    found: int | None = None
    with SpectrumMonitor(bench.dimension, bench.reference, (300.0,), STEP, lambda: now[0]) as monitor:
        for part in torch.split(bench.draw(bench.clean, n), STEP):
            now[0] += len(part) / RATE
            monitor.observe(part)
            monitor.flush()
        for i, part in enumerate(torch.split(case.rows(n), STEP)):
            now[0] += len(part) / RATE
            monitor.observe(part)
            monitor.flush()
            if found is None and monitor.snapshot().verdict.state in wanted:
                found = i * STEP + len(part)
        state = monitor.snapshot().verdict.state
        monitor.record_canary(case.canary)
        monitor.flush()
        return state, monitor.snapshot().verdict.state, found


def rivals(bench: Bench, rows: Tensor) -> dict[str, float]:
    """Simple detectors' scores of a window, higher is worse: what a user might set a threshold on instead."""
    healthy = bench.clean[:2000]
    sample = rows[:2000]
    bandwidth = float((healthy[:1000] - healthy[1000:]).square().sum(1).median())

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((-torch.cdist(a, b).square() / bandwidth).exp().mean())

    return {
        "mean cosine": measures.mean_cosine(rows),
        "1 - std ratio": 1 - measures.std_ratio(rows),
        "distance of means": float((rows.mean(0) - bench.reference.mean.float()).norm()),
        "MMD": kernel(healthy, healthy) + kernel(sample, sample) - 2 * kernel(healthy, sample),
        "1 / effective rank": 1 / measures.effective_rank(torch.linalg.eigvalsh(rows.T.cov())),
    }


def rounding(bench: Bench) -> str:
    """What serving in bfloat16 adds to the rows, beside the floor that is meant to cover it."""
    served = unit(Embedder(bench.artifact, dtype=torch.bfloat16).embed(bench.images))
    eigenvalues = torch.linalg.eigvalsh((served - bench.clean).double().T.cov())
    floor = measures.noise_floor(torch.bfloat16, bench.dimension)
    return (
        f"bfloat16 noise: {float(eigenvalues.mean()):.1e} a direction, median {float(eigenvalues.median()):.1e}; "
        f"{int((eigenvalues > floor).sum())} of {bench.dimension} directions above the floor of {floor:.1e}"
    )


def nulls(bench: Bench, n: int) -> list[Tensor]:
    """Healthy traffic of three kinds."""
    return [bench.draw(bench.clean, n), bench.sessions(n), bench.drift(n)]


def main() -> None:
    """Print the table of cases, the confusion with the canary on and off, and the false alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("models/pretrained/fashion-directclr"))
    parser.add_argument("--collapsed", type=Path, help="another encoder, swapped in by mistake")
    parser.add_argument("--rows", type=int, default=6000, help="rows of a case: 6000 are 5 minutes at 20 a second")
    parser.add_argument("--images", type=int, default=10000, help="test images to embed")
    parser.add_argument("--null-windows", type=int, default=100, help="healthy windows of each kind, for false alarms")
    options = parser.parse_args()
    source = SOURCES["fashion"]
    test = source.read(source.default, "test").take(slice(0, options.images))
    bench = Bench(load(options.encoder), test.images, test.labels)
    limits = [rivals(bench, rows) for _ in range(5) for rows in nulls(bench, options.rows)]
    worst = {name: max(scores[name] for scores in limits) for name in limits[0]}
    confusion: dict[bool, Counter[tuple[str, str]]] = {True: Counter(), False: Counter()}
    heads = ("case", "kind", "state, canary off", "found after rows", "with canary", "rivals that alarm")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for case in bench.cases(load(options.collapsed) if options.collapsed else None):
        state, with_canary, found = watch(bench, case, options.rows)
        for canary, verdict in ((False, state), (True, with_canary)):
            group = "model" if verdict in MODEL else "traffic" if verdict in TRAFFIC else "none"
            confusion[canary][case.kind, group] += 1
        alarms = [name for name, score in rivals(bench, case.rows(options.rows)).items() if score > worst[name]]
        print(
            f"| {case.name} | {case.kind} | {state} | {found or '–'} | {with_canary} | {', '.join(alarms) or '–'} |",
            flush=True,
        )
    for canary, counts in confusion.items():
        print(f"\ncanary {'on' if canary else 'off'}: cases of a kind (row) read as a kind (column)")
        for kind in ("model", "traffic", "none"):
            print(
                f"  {kind:<8}" + "".join(f"{group} {counts[kind, group]:<4}" for group in ("model", "traffic", "none"))
            )
    print("\n" + rounding(bench))
    blocks = alarms_seen = 0
    for law in range(3):
        now = [0.0]
        with SpectrumMonitor(bench.dimension, bench.reference, (300.0,), STEP, lambda now=now: now[0]) as monitor:  # type: ignore[misc]
            for _ in range(options.null_windows):
                for part in torch.split(nulls(bench, options.rows)[law], STEP):
                    now[0] += len(part) / RATE
                    monitor.observe(part)
                    monitor.flush()
                    blocks += 1
                    alarms_seen += monitor.snapshot().verdict.state in (*MODEL, *TRAFFIC)
    bound = (3.0 if not alarms_seen else alarms_seen + 2 * math.sqrt(alarms_seen) + 2) / max(1, blocks)
    print(f"\nfalse alarms: {alarms_seen} in {blocks} healthy blocks; 95 % bound {bound:.1e} a block")


if __name__ == "__main__":
    main()
