"""The papers' claims: what was published, what the experiments saw of it, and what only a GPU could see."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import _experiments_slopes
from benchmarks._experiments_page import ended, one_a_seed
from benchmarks._methods_claims import (
    Claim,
    Record,
    alignment,
    dead_h,
    dead_z,
    linear,
    one_percent,
    ten_percent,
    variance_h,
)
from benchmarks._methods_configurations import TWINS

EARLY = ", after the first epoch"
MLP, LINEAR, NONE = (f"SimCLR, {kind} projector" for kind in ("mlp", "linear", "none"))
LEAST, MOST = (f"SimCLR, weight decay {decay}" for decay in ("0.0001", "0.003"))
TRAINED, TWO, PAPER, RELEASED = "BYOL, linear predictor", "BYOL, two layers", "DirectPred", "DirectPred, as released"
OPTIMAL = "DirectPred, optimal predictor"
SAME_NETWORK, SAME_VIEWS = "DirectPred, predictor trained", "BYOL, two layers, DirectPred's views"
SMALL, LARGE = "batch 64, rate 1.0", "batch 1024, rate 1.0"
EQUAL = {"G": "epochs", "H": "steps"}
NEVER = "--option frequency=1000000000"
EIGHT = "torchrun --nproc-per-node 8 $(which fullrank)"


class Near(NamedTuple):
    """A claim, the experiment that it is held against, and the paper's figures in the order of the claim's sides."""

    letter: str
    published: str
    claim: Claim


class Far(NamedTuple):
    """What this machine cannot show: commands, and an estimate of their hours on a GPU."""

    says: str
    source: str
    published: str
    commands: tuple[str, ...]
    hours: str


def _near(
    letter: str, source: str, published: str, says: str, metric: Callable[[Record], float], first: str, second: str
) -> Near:
    return Near(letter, published, Claim(says, source, metric, first, second))


def _level(letter: str, source: str, published: str, says: str, first: str, second: str) -> Near:
    return Near(letter, published, Claim(f"probe: {says}, 2 points below at most", source, linear, first, second, 2))


def _batches(letter: str, equal: str) -> list[Near]:
    """What is said of batches, of the runs at the higher of the two rates."""
    barlow, simclr = ([f"{name}, {size}" for size in (SMALL, LARGE)] for name in ("Barlow Twins", "SimCLR"))
    falls, kept, over = "4 points from the best to 256", "69.7 at 128, 71.7 at 1024", "73.2, 69.3"
    said = "probe: Barlow Twins over SimCLR at batch"
    return [
        _near(letter, "Zbontar", falls, f"probe: SimCLR at batch 1024 over 64, equal {equal}", linear, *simclr[::-1]),
        _level(letter, "Zbontar", kept, f"Barlow Twins at batch 64 level with 1024, equal {equal}", *barlow),
        _near(letter, "Zbontar", over, f"{said} 64, equal {equal}", linear, barlow[0], simclr[0]),
        _near(letter, "Zbontar", over, f"{said} 1024, equal {equal}", linear, barlow[1], simclr[1]),
    ]


def _few_labels() -> list[Near]:
    said, barlow = "fine-tuned on {} % of the labels: Barlow Twins over {}", "Barlow Twins"
    return [
        _near("I", "Zbontar", "55.0, 48.3", said.format(1, "SimCLR"), one_percent, barlow, "SimCLR"),
        _near("I", "Zbontar", "69.7, 65.6", said.format(10, "SimCLR"), ten_percent, barlow, "SimCLR"),
        _near("I", "Zbontar", "55.0, 53.2", said.format(1, "BYOL"), one_percent, barlow, "BYOL"),
        _near("I", "Zbontar", "69.7, 68.8", said.format(10, "BYOL"), ten_percent, barlow, "BYOL"),
        _near("I", "Zbontar", "73.2, 69.3", "probe: Barlow Twins over SimCLR", linear, barlow, "SimCLR"),
        _level("I", "Zbontar", "73.2, 74.3", "Barlow Twins level with BYOL", barlow, "BYOL"),
    ]


NEAR = [
    *(
        _near("A", "Jing", "30 of 128 die", f"dead of z: SimCLR over the twin, {it} statistics", dead_z, LEAST, twin)
        for it, twin in TWINS.items()
    ),
    _near("A", "ours", "", "dead of z: weight decay 0.003 over 0.0001", dead_z, MOST, LEAST),
    _near("B", "Jing", "figures 7, 9", "dead of h: no projector over an MLP", dead_h, NONE, MLP),
    _near("B", "Jing", "figures 7, 9", "dead of h: no projector over DirectCLR", dead_h, NONE, "DirectCLR"),
    _near("B", "Jing", "66.5, 51.5", "probe: an MLP projector over none", linear, MLP, NONE),
    _near("B", "Jing", "61.1, 51.5", "probe: a linear projector over none", linear, LINEAR, NONE),
    _near("B", "Jing", "62.7, 51.5", "probe: DirectCLR over no projector", linear, "DirectCLR", NONE),
    _near("B", "Jing", "66.5, 62.7", "probe: an MLP projector over DirectCLR", linear, MLP, "DirectCLR"),
    _near("F", "Jing", "62.7, 61.1", "probe: DirectCLR over a linear projector", linear, "DirectCLR", LINEAR),
    *(
        _near("C", "Tian; Chen & He", "collapse", f"variance of h: {name} over it without {part}", variance_h, *sides)
        for name in ("BYOL", "SimSiam")
        for part in ("predictor", "stop-gradient")
        for sides in [(f"{name}, no projector", f"{name}, no projector, no {part}")]
    ),
    _near("E", "Tian", "to 1", "alignment: the last epoch over the first", alignment, TRAINED, TRAINED + EARLY),
    _near("D", "Tian", "85.2, 84.5", "probe: DirectPred (released) over BYOL's linear", linear, RELEASED, TRAINED),
    _near("D", "Tian", "85.2, 84.5", "the same, in DirectPred's own network and views", linear, RELEASED, SAME_NETWORK),
    _near("D", "Tian", "85.2, 84.5", "probe: DirectPred (paper's formula) over BYOL's linear", linear, PAPER, TRAINED),
    _level("D", "Tian", "72.4, 72.5", "DirectPred (released) level with BYOL's two layers", RELEASED, TWO),
    _level("D", "Tian", "72.4, 72.5", "the same, with DirectPred's views", RELEASED, SAME_VIEWS),
    _near(
        "D", "Tian", "32 to 41", "probe: DirectPred (released) over the optimal predictor", linear, RELEASED, OPTIMAL
    ),
    _level("D", "Wang", "level", "DirectCopy level with DirectPred (released)", "DirectCopy", RELEASED),
    *(near for letter, equal in EQUAL.items() for near in _batches(letter, equal)),
    *_few_labels(),
]

FAR = [
    Far(
        "DirectPred over a trained linear predictor on CIFAR-10",
        "Tian",
        "85.2, 84.5; 88.9, 88.6; 89.5, 89.3 after 100, 300, 500 epochs",
        (
            "fullrank train cifar10-directpred --data DIR --epochs 500 --device cuda",
            f"fullrank train cifar10-directpred {NEVER} --data DIR --epochs 500 --device cuda",
            "fullrank evaluate RUN --probes --data DIR --device cuda",
        ),
        "0.2, 0.7 or 1.2 each",
    ),
    Far(
        "the same on STL-10",
        "Tian",
        "77.9, 75.1; 78.8, 75.3; 78.9, 75.3",
        (
            "fullrank train stl10-directpred --data DIR --epochs 500 --device cuda",
            f"fullrank train stl10-directpred {NEVER} --data DIR --epochs 500 --device cuda",
        ),
        "0.5, 1.6 or 2.7 each",
    ),
    Far(
        "the same on ImageNet, and BYOL's two layers",
        "Tian",
        "72.4, 69.9; 72.5 after 300 epochs",
        (
            f"{EIGHT} train imagenet-directpred --data DIR --device cuda",
            f"{EIGHT} train imagenet-directpred {NEVER} --data DIR --device cuda",
            f"{EIGHT} train imagenet-byol --data DIR --epochs 300 --learning-rate 4.8 --device cuda",
        ),
        "200 each",
    ),
    Far(
        "DirectCLR, a linear projector, an MLP and none on ImageNet",
        "Jing",
        "62.7, 61.1, 66.5, 51.5 after 100 epochs",
        (
            f"{EIGHT} train imagenet-directclr --data DIR --device cuda",
            *(
                f"{EIGHT} train imagenet-simclr --option projector={kind} --data DIR --device cuda"
                for kind in ("linear", "mlp", "none")
            ),
        ),
        "50 each",
    ),
    Far(
        "Barlow Twins on ImageNet, on all labels, 1 % and 10 %",
        "Zbontar",
        "73.2, 55.0, 69.7 after 1000 epochs; SimCLR 69.3, 48.3, 65.6; BYOL 74.3, 53.2, 68.8",
        (
            f"{EIGHT} train imagenet-barlow-twins --data DIR --device cuda",
            "fullrank evaluate RUN --sgd --data DIR --device cuda",
        ),
        "500",
    ),
    Far(
        "non-contrastive methods hold at small batches",
        "Grill; Chen & He",
        "SimSiam on ImageNet after 100 epochs: 66.1, 68.1, 64.0 at batch 64, 256, 4096",
        (
            "fullrank train cifar10-simsiam --batch-size 64 --learning-rate 0.0075 --data DIR --device cuda",
            "fullrank train cifar10-simclr --batch-size 64 --learning-rate 0.25 --data DIR --device cuda",
        ),
        "4 and 5",
    ),
]


def flat(letter: str, records: Sequence[Record]) -> list[Record]:
    """An experiment's records as claims read them: each run after its last and its first epoch, and a seed's twins."""
    mine = ended(letter, records)
    ends = [record | record["epochs"][-1] for record in mine]
    starts = [{"name": it["name"] + EARLY, "seed": it["seed"]} | it["epochs"][0] for it in mine]
    twins = [
        {"name": name, "seed": record["seed"]} | record[f"untrained_{kind}"]
        for kind, name in TWINS.items()
        for record in one_a_seed(mine)
    ]
    return [*ends, *starts, *twins]


def claims_table(records: Sequence[Record]) -> str:
    """Two tables: what was held against experiments, and what needs a GPU."""
    lines = ["| claim | source | published | by | here | seeds | verdict |", "|---|---|---|---|---|---|---|"]
    for letter, published, claim in NEAR:
        mine = flat(letter, records)
        measured, verdict = claim.read(mine)
        if not measured:
            verdict = f"not run: `python -m benchmarks.experiments {letter}`"
        cells = [claim.says, claim.source, published, letter, measured, str(len(claim.seeds(mine)) or ""), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [_experiments_slopes.claim(letter, equal, ended(letter, records)) for letter, equal in EQUAL.items()]
    lines += ["", "| claim | source | published | needs a GPU | hours |", "|---|---|---|---|---|"]
    for says, source, published, commands, hours in FAR:
        run = ", ".join(f"`{command}`" for command in commands)
        lines.append(f"| {says} | {source} | {published} | {run} | {hours} |")
    return "\n".join(lines)
