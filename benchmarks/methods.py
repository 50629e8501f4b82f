"""Every method and its ablations on Fashion-MNIST beside their untrained twins: kNN, probe, ranks; the papers' claims.

    python -m benchmarks.methods [--scale full --device cuda] [--write docs/measured/methods.md]

Same backbone, images, epochs, optimiser and seeds for all. One line of JSON a run in --results; what is there is not
run again, so an interrupted table goes on where it stopped. Test labels only measure: nothing is chosen by them.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks._page import write_between
from benchmarks.experiments import geometry
from models.artifact import Architecture
from models.embedder import Embedder
from training.data import ImageSet, Split, load_data
from training.evaluate import knn_accuracy
from training.guard import twins
from training.loop import Trainer, TrainingError
from training.probe import linear_probe
from training.recipes import Recipe, recipe

Record = dict[str, Any]
BARE, TRAINED, OPTIMAL = "SimCLR, no projector", "BYOL, linear predictor", "DirectPred, optimal predictor"
LONGER, HARDER, EAGER = ", longer", ", crops from 0.08", ", predictor's rate x 10"
UNMEASURED = "not measured"
TWINS = {"initial": "Untrained, initial statistics", "measured": "Untrained, statistics of the data"}
LARGER = "SimCLR, batch 256", "Barlow Twins, batch 256"
LOW_RATE = ", rate 0.03"  # half of DirectPred's published step: its loss is a sum over directions, ours their mean


@dataclass(frozen=True)
class Scale:
    """How large a table: `small` takes an hour of one core, `full` wants an accelerator."""

    width: int
    images: int
    tests: int
    epochs: int
    batch_size: int
    momentum: float
    wide: int
    """Projector width of the methods that want a wide one."""
    batch_sizes: tuple[int, ...]
    longer: int
    """Epochs of the runs that ask whether a claim only wants time."""


SCALES = {
    "small": Scale(16, 4096, 2000, 3, 64, 0.97, 512, (256, 1024), 12),
    "full": Scale(64, 60_000, 10_000, 30, 512, 0.99, 2048, (64, 128, 256, 1024), 100),
}


@dataclass(frozen=True)
class Configuration:
    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    learning_rate: float | None = None
    """None: 0.2 at batch 128, by the root of the batch size."""
    epochs: int | None = None
    crop: tuple[float, float] | None = None
    """Share of the image that a view keeps; None: the recipe's."""
    reason: bool = False
    """Run with the first seed alone, to try an explanation."""


def configurations(scale: Scale) -> list[Configuration]:
    slow, wide = {"momentum": scale.momentum}, {"projection": scale.wide, "hidden": scale.wide}
    direct = slow | {"constant_momentum": False}
    siam = {"projection": scale.wide, "bottleneck": scale.wide // 4}
    contrast = {"temperature": 0.2}
    # The same losses over a constant: SGD's step, unlike LARS', would answer to their scale.
    barlow, vicreg = wide | {"scale": 10 / scale.wide}, wide | {"invariance": 1.0, "variance": 1.0, "covariance": 0.04}
    table = [
        Configuration("SimCLR", "simclr", contrast),
        Configuration("SimCLR, linear projector", "simclr", contrast | {"projector": "linear"}),
        Configuration("SimCLR, no projector", "simclr", contrast | {"projector": "none"}),
        Configuration("SimCLR, fixed low-rank projector", "simclr", contrast | {"projector": "low-rank"}),
        Configuration("SimCLR, trainable diagonal projector", "simclr", contrast | {"projector": "diagonal"}),
        Configuration("DirectCLR", "directclr", {"d0": scale.width * 2, "temperature": 0.2}),
        Configuration("BYOL", "byol", slow),
        Configuration("BYOL, no stop-gradient", "byol", slow | {"stop_gradient": False}),
        Configuration("BYOL, no predictor", "byol", slow | {"predictor": False}),
        Configuration("BYOL, no average", "byol", {"momentum": None}),
        Configuration(
            "BYOL, neither predictor nor stop-gradient", "byol", {"predictor": False, "stop_gradient": False}
        ),
        Configuration("BYOL, linear predictor", "byol", slow | {"linear_predictor": True}),
        Configuration(
            "BYOL, symmetric linear predictor, no average",
            "byol",
            {"momentum": None, "linear_predictor": True, "symmetric": True},
        ),
        Configuration("SimSiam", "simsiam", siam),
        Configuration("SimSiam, no stop-gradient", "simsiam", siam | {"stop_gradient": False}),
        Configuration("SimSiam, no predictor", "simsiam", siam | {"predictor": False}),
        Configuration("DirectPred", "directpred", direct),
        Configuration("DirectPred, as released", "directpred", direct | {"variant": "released"}),
        Configuration("DirectPred, every 5 steps", "directpred", direct | {"frequency": 5}),
        Configuration("DirectPred, optimal predictor", "directpred", direct | {"variant": "optimal"}),
        Configuration("DirectCopy", "directcopy", direct),
        Configuration("Barlow Twins", "barlow-twins", barlow),
        Configuration("Barlow Twins, lambda 42/d", "barlow-twins", barlow | {"redundancy": 42 / scale.wide}),
        Configuration("VICReg", "vicreg", vicreg),
        Configuration("SIGReg", "sigreg", {"hidden": scale.wide}),
    ]
    table += [
        Configuration(it.name + LOW_RATE, it.method, it.options, learning_rate=0.03)
        for it in table
        if it.name in (TRAINED, "DirectPred", OPTIMAL, "DirectCopy")
    ]
    for size in scale.batch_sizes:
        table.append(Configuration(f"SimCLR, batch {size}", "simclr", contrast, size))
        table.append(Configuration(f"Barlow Twins, batch {size}", "barlow-twins", barlow, size))
    base = {it.name: it for it in table}
    table += [
        replace(base[name], name=name + LONGER, epochs=scale.longer, reason=True)
        for name in ("SimCLR", BARE, TRAINED, "DirectPred", OPTIMAL, *LARGER)
    ]
    table += [replace(base[name], name=name + HARDER, crop=(0.08, 1.0), reason=True) for name in ("SimCLR", BARE)]
    eager = base[TRAINED].options | {"predictor_lr": 10.0}
    return [*table, replace(base[TRAINED], name=TRAINED + EAGER, options=eager, reason=True)]


def recipe_of(configuration: Configuration, scale: Scale, seed: int) -> Recipe:
    """Fashion-MNIST's recipe with this method; the learning rate follows the root of the batch size."""
    batch_size, base = configuration.batch_size or scale.batch_size, recipe("fashion-simclr")
    return replace(
        base,
        name=f"fashion-{configuration.method}",
        method=configuration.method,
        options=configuration.options,
        architecture=Architecture(name="resnet18", width=scale.width, in_channels=1, stem="3x3/2"),
        augmentation=replace(base.augmentation, crop=configuration.crop or base.augmentation.crop),
        epochs=configuration.epochs or scale.epochs,
        batch_size=batch_size,
        learning_rate=configuration.learning_rate or 0.2 * math.sqrt(batch_size / 128),
        seed=seed,
    )


def twin_records(scale: Scale, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> list[Record]:
    """What both untrained twins read in the very same measurements: SimCLR's heads, no step taken."""
    train, test = (images.take(slice(n)) for images, n in zip(data, (scale.images, scale.tests), strict=True))
    trainer = Trainer(recipe_of(configurations(scale)[0], scale, seed), Split.of(train, 512, seed), device)
    records = []
    for twin in twins(trainer):
        embedder = Embedder(twin.artifact, device)
        bank, h = embedder.embed_arrays(train.images), embedder.embed_arrays(test.images)
        record = {"name": TWINS[twin.statistics], "seed": seed, "options": {}, "seconds": None, "alignment": None}
        records.append(record | measured(bank, train, h, twin.project(h), test))
    return records


def measured(bank: Tensor, train: ImageSet, h: Tensor, z: Tensor, test: ImageSet) -> Record:
    return {
        "knn": knn_accuracy(bank, train.labels, h, test.labels),
        "linear": linear_probe(bank, train.labels, h, test.labels).top1,
        **geometry(h, z),
    }


def run(configuration: Configuration, scale: Scale, seed: int, data: tuple[ImageSet, ImageSet], device: str) -> Record:
    """Train once and measure on the test images; what a run that diverged has to say is its error.

    `seconds` are those of training: the process's own on the CPU, whatever else the machine does, else the wall's.
    """
    train, test = (images.take(slice(n)) for images, n in zip(data, (scale.images, scale.tests), strict=True))
    record: Record = {"name": configuration.name, "seed": seed, "options": configuration.options}
    trainer = Trainer(recipe_of(configuration, scale, seed), Split.of(train, 0, seed), device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    try:
        for _ in range(trainer.recipe.epochs):
            record |= {"loss": trainer.train_epoch()["loss"]}
    except TrainingError as error:
        return record | {"error": str(error)}
    record["seconds"] = round(clock() - start, 1)
    embedder = Embedder(trainer.artifact(), device)
    bank, h = embedder.embed_arrays(train.images), embedder.embed_arrays(test.images)
    alignment = trainer.method.watch().get("predictor_alignment")
    mean = statistics.fmean(alignment) if isinstance(alignment, list) and alignment else None
    return record | {"alignment": mean} | measured(bank, train, h, trainer.project(h), test)


@dataclass(frozen=True)
class Claim:
    """What a paper says: `metric` of the first is above that of the second, or within `tolerance` of it."""

    says: str
    source: str
    metric: Callable[[Record], float]
    first: str
    second: str
    tolerance: float | None = None

    def tells(self, record: Record) -> bool:
        """Whether the run ended and measured what the claim is about; the first runs counted no dead dimensions."""
        return "error" not in record and (self.metric not in (dead_h, dead_z) or "dead" in record["z"])

    def bar(self, records: Sequence[Record]) -> float | None:
        """The better untrained twin's mean accuracy; None for a claim that is not about accuracy."""
        if self.metric not in (knn, linear):
            return None
        found = [[self.metric(r) for r in records if r["name"] == name] for name in TWINS.values()]
        return max((statistics.fmean(values) for values in found if values), default=None)

    def verdict(self, records: Sequence[Record]) -> str:
        a, b = (
            {r["seed"]: self.metric(r) for r in records if r["name"] == name and self.tells(r)}
            for name in (self.first, self.second)
        )
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return UNMEASURED
        bar = self.bar(records)
        if bar is not None and max(statistics.fmean(a[s] for s in seeds), statistics.fmean(b[s] for s in seeds)) <= bar:
            means = f"{statistics.fmean(a[s] for s in seeds):.3g} against {statistics.fmean(b[s] for s in seeds):.3g}"
            return f"{means}: not counted, both below the untrained twin's {bar:.3g}"
        means = f"{statistics.fmean(a[s] for s in seeds):.3g} against {statistics.fmean(b[s] for s in seeds):.3g}"
        gaps = [a[s] - b[s] for s in seeds]
        if self.tolerance is not None:
            seen = abs(statistics.fmean(gaps)) <= self.tolerance
        elif min(gaps) <= 0 < max(gaps):
            return f"{means}: **unclear**, the seeds disagree"
        else:
            seen = min(gaps) > 0
        return f"{means}: {'seen' if seen else '**not seen**'}"


def knn(record: Record) -> float:
    return 100 * float(record["knn"])


def linear(record: Record) -> float:
    return 100 * float(record["linear"])


def rank_h(record: Record) -> float:
    return float(record["h"]["effective_rank"])


def share_z(record: Record) -> float:
    return float(record["z"]["effective_rank"]) / int(record["z"]["dimension"])


def variance_z(record: Record) -> float:
    return float(record["z"]["total_variance"])


def dead_h(record: Record) -> float:
    return float(record["h"]["dead"])


def dead_z(record: Record) -> float:
    return float(record["z"]["dead"])


CLAIMS = [
    Claim("DirectCLR's z uses a larger share of its dimensions than SimCLR's", "Jing", share_z, "DirectCLR", "SimCLR"),
    Claim("rank of h: DirectCLR over no projector", "Jing", rank_h, "DirectCLR", BARE),
    Claim("rank of h: a projector over none", "Jing", rank_h, "SimCLR", BARE),
    Claim("linear probe: a projector over none", "Jing", linear, "SimCLR", BARE),
    Claim("linear probe: DirectCLR over no projector", "Jing", linear, "DirectCLR", BARE),
    Claim("linear probe: DirectCLR over a linear projector", "Jing", linear, "DirectCLR", "SimCLR, linear projector"),
    Claim("linear probe: a 2-layer projector over DirectCLR", "Jing", linear, "SimCLR", "DirectCLR"),
    *(
        Claim(f"{what}: {name} over {name} without {part}", "Tian; Chen & He", metric, name, f"{name}, no {part}")
        for name in ("BYOL", "SimSiam")
        for part in ("stop-gradient", "predictor")
        for what, metric in (("variance of z", variance_z), ("kNN", knn))
    ),
    *(
        claim
        for rate in ("", LOW_RATE)
        for claim in (
            Claim(
                f"linear probe: DirectPred over a trained linear predictor{rate}",
                "Tian",
                linear,
                "DirectPred" + rate,
                TRAINED + rate,
            ),
            Claim(
                f"linear probe: DirectPred over the optimal predictor{rate}",
                "Tian",
                linear,
                "DirectPred" + rate,
                OPTIMAL + rate,
            ),
            Claim(
                f"linear probe: DirectCopy within 2 points of DirectPred{rate}",
                "Wang",
                linear,
                "DirectCopy" + rate,
                "DirectPred" + rate,
                2,
            ),
        )
    ),
]


CLAIMS.append(
    Claim("linear probe: DirectPred within 2 points of BYOL's two layers", "Tian", linear, "DirectPred", "BYOL", 2)
)
CLAIMS += [
    Claim("dead dimensions of z: SimCLR over the twin", "Jing", dead_z, "SimCLR", TWINS["measured"]),
    Claim("dead dimensions of h: no projector over a projector", "Jing", dead_h, BARE, "SimCLR"),
    Claim("linear probe: Barlow Twins over SimCLR", "Zbontar", linear, "Barlow Twins", "SimCLR"),
    Claim("linear probe: Barlow Twins within 2 points of BYOL", "Zbontar", linear, "Barlow Twins", "BYOL", 2),
]

REASONS = [
    Claim("longer, rank of h: a projector over none", "time", rank_h, "SimCLR" + LONGER, BARE + LONGER),
    Claim("longer, no projector: the rank of h falls", "time", rank_h, BARE, BARE + LONGER),
    Claim("hard crops, rank of h: a projector over none", "augmentation", rank_h, "SimCLR" + HARDER, BARE + HARDER),
    Claim("hard crops, no projector: the rank of h falls", "augmentation", rank_h, BARE, BARE + HARDER),
    Claim("longer, probe: DirectPred over trained", "time", linear, "DirectPred" + LONGER, TRAINED + LONGER),
    Claim("longer, probe: DirectPred over optimal", "time", linear, "DirectPred" + LONGER, OPTIMAL + LONGER),
    Claim("probe: DirectPred over trained fast", "learning rate", linear, "DirectPred", TRAINED + EAGER),
    Claim("as many steps, probe: SimCLR as at batch 64", "steps", linear, LARGER[0] + LONGER, "SimCLR", 2),
    Claim("as many steps, probe: Barlow Twins too", "steps", linear, LARGER[1] + LONGER, "Barlow Twins", 2),
]


def batch_table(scale: Scale, records: Sequence[Record]) -> str:
    """SimCLR beside Barlow Twins, which is said to need smaller batches, at each batch size."""
    base = [("", scale.batch_size), *((f", batch {size}", size) for size in scale.batch_sizes)]
    rows = []
    for suffix, size in sorted(base, key=lambda pair: pair[1]):
        cells = [summary(linear, of(records, method + suffix), 1) for method in ("SimCLR", "Barlow Twins")]
        rows.append(f"| {size} | {cells[0]} | {cells[1]} |")
    return "\n".join(["| batch | SimCLR, linear probe | Barlow Twins, linear probe |", "|---|---|---|", *rows])


def of(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record["name"] == name and "error" not in record]


def summary(metric: Callable[[Record], float], records: Sequence[Record], digits: int) -> str:
    """Mean, and its standard error over the seeds."""
    if not records:
        return ""
    values = [metric(record) for record in records]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return f"{statistics.fmean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def row(name: str, mine: Sequence[Record]) -> str:
    """A line of the table. Runs of the first version did not count dead dimensions."""
    aligned = [r for r in mine if r["alignment"] is not None]
    counted = [r for r in mine if "dead" in r["z"]]
    cells = [
        summary(knn, mine, 1),
        summary(linear, mine, 1),
        summary(rank_h, mine, 1),
        summary(lambda r: r["z"]["effective_rank"], mine, 1),
        str(mine[0]["z"]["dimension"]),
        summary(dead_h, counted, 1),
        summary(dead_z, counted, 1),
        summary(variance_z, mine, 3),
        summary(lambda r: r["alignment"], aligned, 2),
        summary(lambda r: r["seconds"], [r for r in mine if r["seconds"] is not None], 0),
        str(len(mine)),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def page(scale_name: str, records: Sequence[Record]) -> str:
    """The measured part of docs/measured/methods.md."""
    scale = SCALES[scale_name]
    facts = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in asdict(scale).items() if key != "batch_sizes"
    )
    lines = [f"Scale `{scale_name}`: {facts}; runs: {len(records)}.", ""]
    lines.append(
        "| method | kNN % | linear % | rank of h | rank of z | of | dead of h | dead of z | variance of z | alignment"
        " | seconds | seeds |"
    )
    lines.append("|---" * 12 + "|")
    lines += [row(name, of(records, name)) for name in TWINS.values() if of(records, name)]
    for configuration in configurations(scale):
        mine = of(records, configuration.name)
        if not mine:
            failed = any(record["name"] == configuration.name for record in records)
            if configuration.reason and not failed:
                continue
            lines.append(f"| {configuration.name} | {'diverged' if failed else 'not run'} |" + " |" * 10)
            continue
        lines.append(row(configuration.name, mine))
    lines += ["", "| claim | source | measured |", "|---|---|---|"]
    lines += [f"| {claim.says} | {claim.source} | {claim.verdict(records)} |" for claim in CLAIMS]
    lines += ["", "| what a guess says should happen | the guess | measured, first seed |", "|---|---|---|"]
    tried = [(claim, claim.verdict(records)) for claim in REASONS]
    lines += [f"| {claim.says} | {claim.source} | {said} |" for claim, said in tried if said != UNMEASURED]
    return "\n".join([*lines, "", batch_table(scale, records)])


def keep(record: Record, results: Path, done: list[Record], console: Console) -> None:
    done.append(record)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
    console.print(json.dumps(record), soft_wrap=True, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run configurations whose name contains this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/methods.jsonl"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this many")
    parser.add_argument("--write", type=Path, help="replace the measured part of this page, run nothing")
    given = parser.parse_args()
    scale, console = SCALES[given.scale], Console(stderr=True)
    done: list[Record] = []
    if given.results.exists():
        done = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = [record for record in done if record["scale"] == given.scale]
    if given.write:
        write_between(given.write, "<!-- measured -->", "<!-- end -->", page(given.scale, done))
        return
    torch.set_num_threads(1) if given.device == "cpu" else None
    data, deadline = load_data("fashion", given.data), time.monotonic() + 60 * given.minutes
    assert all(isinstance(images, ImageSet) for images in data)
    for seed in range(given.seeds):
        known = {r["name"] for r in done if r["seed"] == seed}
        if given.only in "Untrained" and not known >= set(TWINS.values()):
            for record in twin_records(scale, seed, data, given.device):  # type: ignore[arg-type]
                keep({"scale": given.scale, **record}, given.results, done, console)
        for configuration in configurations(scale):
            if configuration.reason and seed:
                continue
            if configuration.name in known or given.only not in configuration.name or time.monotonic() > deadline:
                continue
            record = {"scale": given.scale, **run(configuration, scale, seed, data, given.device)}  # type: ignore[arg-type]
            keep(record, given.results, done, console)
    print(page(given.scale, done))


if __name__ == "__main__":
    main()
