"""The summary of docs/measured/detection.md, counted from the lists that the benchmark wrote.

    python -m benchmarks.detection.summary --write docs/measured/detection.md

It reads docs/measured/detection-lists.md and runs nothing: what is right by encoder and list, the confusion matrices by
encoder, and the false pages.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks._page import write_between
from benchmarks.detection.tables import KINDS, TRUTHS

LISTS = Path("docs/measured/detection-lists.md")
MODES = {"canary off": 1, "canary on": 0}  # columns of the lists' counts
NAMES = {
    "": "the rules were made on it",
    "unseen": "first unseen",
    "fresh": "second unseen",
    "preprocessing": "preprocessing",
    "forty": "forty",
    "blind": "blind changes of pixels",
    "crowds": "blind changes of traffic",
}
Counts = Counter[tuple[str, str]]  # (truth, read as) -> runs


@dataclass(frozen=True)
class Found:
    """What one list says of an encoder: by mode its confusion matrix, and how many of its strong faults alarm."""

    encoder: str
    cases: str
    matrix: dict[str, Counts]
    strong: dict[str, int]
    strong_faults: int


def blocks_of(page: str) -> dict[str, str]:
    """Marker -> what the benchmark wrote there."""
    found: list[tuple[str, str]] = re.findall(r"<!-- (.+?): start -->\n(.*?)\n<!-- \1: end -->", page, re.DOTALL)
    return dict(found)


def cells_of(text: str, label: str) -> list[str]:
    """The cells by mode of the row with this label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def found_in(name: str, text: str) -> Found:
    """A list's counts, from its text."""
    encoder, _, cases = name.partition(", ")
    matrix: dict[str, Counts] = {mode: Counter() for mode in MODES}
    for truth, words in TRUTHS.items():
        if f"| {words}, read as" not in text:
            continue
        cells = cells_of(text, f"{words}, read as")
        for mode, column in MODES.items():
            for read, runs in zip(KINDS, cells[column].split(" / "), strict=True):
                matrix[mode][truth, read] = int(runs)
    alarms = [cell.split(" of ") for cell in cells_of(text, "strong faults that alarm")]
    strong = {mode: int(alarms[column][0]) for mode, column in MODES.items()}
    return Found(encoder, cases, matrix, strong, int(alarms[0][1]))


def share(part: int, whole: int) -> str:
    """A count of a count, in per cent."""
    return f"{part} of {whole} ({100 * part / whole:.1f} %)".replace("(100.0 %)", "(100 %)")


def sides(matrix: Counts) -> str:
    """Alarms on the right side, of all alarms at faults."""
    alarms = sum(matrix[truth, read] for truth in KINDS[:2] for read in KINDS[:2])
    return share(sum(matrix[truth, truth] for truth in KINDS[:2]), alarms)


def row(name: str, cases: str, found: list[Found]) -> str:
    """A row of the first table: some lists together."""
    faults = sum(it.strong_faults for it in found)
    strong = [f"{sum(it.strong[mode] for it in found)} of {faults}" for mode in MODES]
    right = [sides(total(found, mode)) for mode in MODES]
    return f"| {' | '.join((name, cases, *strong, *right))} |"


def total(found: list[Found], mode: str) -> Counts:
    """Confusion matrices together."""
    return sum((it.matrix[mode] for it in found), Counter())


def summary(page: str) -> str:
    """All three tables."""
    blocks = blocks_of(page)
    found = [found_in(name, text) for name, text in blocks.items() if "faults that alarm" in text]
    encoders = {it.encoder: [other for other in found if other.encoder == it.encoder] for it in found}
    measured = " | ".join(("strong faults found, canary off", "canary on", "alarms on the right side, canary off"))
    lines = [f"| encoder | list | {measured} | canary on |", "|---|---|---|---|---|---|"]
    lines += [row(f"`{it.encoder}`", NAMES[it.cases], [it]) for it in found]
    lines += [row(f"`{name}`", "all", its) for name, its in encoders.items() if len(its) > 1]
    lines += [row("**all**", "all", found), "\nConfusion matrices, runs of all lists of an encoder:\n"]
    lines.append("| encoder | truly | " + " | ".join(f"{mode}: model / traffic / healthy" for mode in MODES) + " |")
    lines.append("|---|---|---|---|")
    for name, its in {**encoders, "all": found}.items():
        for truth, words in TRUTHS.items():
            cells = [" / ".join(str(total(its, mode)[truth, read]) for read in KINDS) for mode in MODES]
            lines.append(f"| `{name}` | {words} | {' | '.join(cells)} |".replace("`all`", "**all**"))
    lines.append("\nFalse pages, with the exact 95 % bound:\n")
    lines.append("| encoder | pages | healthy blocks | at most, a million | CPU seconds |\n|---|---|---|---|---|")
    for name, text in blocks.items():
        if name.endswith(", blocks"):
            pages, healthy, most, seconds = pages_in(text)
            lines.append(f"| `{name.removesuffix(', blocks')}` | {pages} | {healthy} | {most} | {seconds} |")
    return "\n".join(lines)


def pages_in(text: str) -> tuple[str, ...]:
    """Pages, blocks, the bound and the seconds that a run over blocks tells."""
    told = re.search(r"(\d+) false pages in ([\d,]+) healthy.* to ([\d.]+)\. .*?(\d+) CPU seconds", text)
    assert told is not None
    return told.groups()


def main() -> None:
    """Print the tables, or write them between their markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the markers of the summary")
    options = parser.parse_args()
    text = summary(LISTS.read_text())
    print(text)
    if options.write:
        write_between(options.write, "<!-- summary: start -->", "<!-- summary: end -->", text)


if __name__ == "__main__":
    main()
