"""The measured part of docs/measured/methods.md, from the lines of benchmarks/methods.jsonl."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from benchmarks._methods_claims import (
    CLAIMS,
    REASONS,
    UNMEASURED,
    Record,
    dead_h,
    dead_z,
    knn,
    linear,
    rank_h,
    variance_z,
)
from benchmarks._methods_configurations import SCALES, TWINS, Scale, configurations
from benchmarks._page import mean_and_error
from benchmarks.encoders import PIXELS


def batch_table(scale: Scale, records: Sequence[Record]) -> str:
    """SimCLR beside Barlow Twins, which is said to need smaller batches, at each batch size."""
    base = [("", scale.batch_size), *((f", batch {size}", size) for size in scale.batch_sizes)]
    rows = []
    for suffix, size in sorted(base, key=lambda pair: pair[1]):
        cells = [summary(linear, of(records, method + suffix), 1) for method in ("SimCLR", "Barlow Twins")]
        seeds = len(of(records, f"SimCLR{suffix}"))
        rows.append(f"| {size} | {cells[0]} | {cells[1]} | {seeds} |")
    heads = "| batch | SimCLR, linear probe | Barlow Twins, linear probe | seeds of each |"
    return "\n".join([heads, "|---|---|---|---|", *rows])


def spectra(records: Sequence[Record]) -> str:
    """How far the spectra fall: eigenvalues over the largest, of the first seed's runs that hold some."""
    across = ["a quarter of the way", "half way", "last"]
    heads = ["first seed, eigenvalue over the largest", *(f"{part}: {where}" for part in "hz" for where in across)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    known = [r for r in records if r["seed"] == 0 and "eigenvalues" in r.get("h", {})]
    for record in sorted(known, key=lambda r: -fallen(r["z"], 0.5)):
        cells = [f"{fallen(record[part], share):.1e}" for part in ("h", "z") for share in (0.25, 0.5, 1.0)]
        lines.append(f"| {record['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fallen(spectrum: Record, share: float) -> float:
    """The eigenvalue at this share of the dimension over the largest, between recorded ranks on a log-log line."""
    ranks, values = (np.log(np.maximum(spectrum[key], 1e-30)) for key in ("ranks", "eigenvalues"))
    return float(np.exp(np.interp(np.log(share * spectrum["dimension"]), ranks, values) - values[0]))


def of(records: Sequence[Record], name: str) -> list[Record]:
    return [record for record in records if record["name"] == name and "error" not in record]


def summary(metric: Callable[[Record], float], records: Sequence[Record], digits: int) -> str:
    """Mean, and its standard error over the seeds."""
    return mean_and_error([metric(record) for record in records], digits) if records else ""


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
    trained = [record for record in records if record["name"] != PIXELS[1]]
    precisions = Counter(record.get("precision", "not recorded") for record in trained)
    told = ", ".join(f"{name} {count}" for name, count in sorted(precisions.items()))
    lines = [f"Scale `{scale_name}`: {facts}; runs: {len(trained)}; precision of the runs: {told}.", ""]
    lines.append(
        "| method | kNN % | linear % | rank of h | rank of z | of | dead of h | dead of z | variance of z | alignment"
        " | seconds | seeds |"
    )
    lines.append("|---" * 12 + "|")
    lines += [
        f"| {PIXELS[1]} | {100 * it['knn']:.1f} | {100 * it['linear']:.1f} |" + " |" * 9
        for it in of(records, PIXELS[1])
    ]
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
    lines += ["", "| claim | source | measured | seeds |", "|---|---|---|---|"]
    for claim in CLAIMS:
        lines.append(f"| {claim.says} | {claim.source} | {claim.verdict(records)} | {len(claim.seeds(records))} |")
    lines += ["", "| what a guess says should happen | the guess | measured, first seed |", "|---|---|---|"]
    tried = [(claim, claim.verdict(records)) for claim in REASONS]
    lines += [f"| {claim.says} | {claim.source} | {said} |" for claim, said in tried if said != UNMEASURED]
    return "\n".join([*lines, "", batch_table(scale, records), "", spectra(records)])
