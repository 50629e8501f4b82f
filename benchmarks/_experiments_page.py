"""The experiments' part of docs/measured/methods.md, from the lines of benchmarks/experiments.jsonl."""

from collections.abc import Sequence
from typing import Any

from benchmarks import _experiments_slopes
from benchmarks._experiments_cases import EXPERIMENTS
from benchmarks._page import mean_and_error
from benchmarks.encoders import PIXELS

Record = dict[str, Any]

EPOCHS = 10


def ended(letter: str, records: Sequence[Record]) -> list[Record]:
    """The experiment's runs that did not diverge."""
    return [record for record in records if record["experiment"] == letter and "error" not in record]


def one_a_seed(runs: Sequence[Record]) -> list[Record]:
    """The first run of each seed. Pixels and twins are the same beside every case of a seed, but for z, which is that
    of the first case's projector."""
    return list({run["seed"]: run for run in reversed(runs)}.values())


def spaced(epochs: Sequence[Record]) -> list[Record]:
    """At most EPOCHS of these, evenly spaced, the first and the last among them."""
    if len(epochs) <= EPOCHS:
        return list(epochs)
    return [epochs[round(place * (len(epochs) - 1) / (EPOCHS - 1))] for place in range(EPOCHS)]


def table(letter: str, records: Sequence[Record]) -> list[str]:
    """One experiment's rows: each case after its last epoch, and both untrained twins."""
    shares = {"finetune_one_percent": "1 % of labels", "finetune_ten_percent": "10 %"}
    scores = {"knn": "kNN %", "linear": "linear %"} | (shares if EXPERIMENTS[letter].few_labels else {})
    mine = ended(letter, records)
    aligned = ["alignment"] if any(r["epochs"][-1]["alignment"] is not None for r in mine) else []
    heads = [
        *scores.values(),
        "variance of h",
        "dead of h",
        "dead of z",
        "dead of z over the epochs, first seed",
        *aligned,
        "seeds",
    ]
    lines = ["", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    once = one_a_seed(mine)
    rows = [(f"untrained, {it} statistics", [r[f"untrained_{it}"] for r in once]) for it in ("initial", "measured")]
    for case in EXPERIMENTS[letter].cases:
        rows.append((case.name, [r | r["epochs"][-1] for r in mine if r["name"] == case.name]))
    if once:
        known = [r["pixels"] for r in once]
        cells = [mean_and_error([100 * r[key] for r in known], 1) if key in known[0] else "" for key in scores]
        rest = [""] * (len(heads) - len(cells) - 1)
        lines.append(f"| {PIXELS[1]} | " + " | ".join([*cells, *rest, str(len(known))]) + " |")
    for name, found in rows:
        if not found:
            lines.append(f"| {name} | not run |" + " |" * (len(heads) - 1))
            continue
        course = ", ".join(str(it["z"]["dead"]) for it in spaced(found[0].get("epochs", [])))
        cells = [mean_and_error([100 * r[key] for r in found], 1) for key in scores]
        cells.append(mean_and_error([r["h"]["total_variance"] for r in found], 3))
        cells += [
            f"{mean_and_error([r[s]['dead'] for r in found], 1)} of {found[0][s]['dimension']}" for s in ("h", "z")
        ]
        cosines = [r["alignment"] for r in found if r.get("alignment") is not None]
        shown = [mean_and_error(cosines, 3) if cosines else ""] if aligned else []
        lines.append(f"| {name} | " + " | ".join([*cells, course, *shown, str(len(found))]) + " |")
    return lines


def page(records: Sequence[Record]) -> str:
    lines = ["| | what it is to show | status | CPU hours | GPU hours | command |", "|---|---|---|---|---|---|"]
    for letter, it in EXPERIMENTS.items():
        done = sum(record["experiment"] == letter for record in records)
        wanted = len(it.cases) * it.seeds
        status = f"{done} of {wanted} runs" if done else "not run; needs a GPU or the CPU hours"
        command = f"`python -m benchmarks.experiments {letter}`"
        lines.append(f"| {letter} | {it.says} | {status} | {it.cpu_hours:g} | {it.gpu_hours:g} | {command} |")
    for letter in EXPERIMENTS:
        if any(record["experiment"] == letter for record in records):
            lines += ["", f"**{letter}: {EXPERIMENTS[letter].says}.**", *table(letter, records)]
            lines += _experiments_slopes.table(letter, ended(letter, records))
    return "\n".join(lines)
