"""The benchmark's results as Markdown: what was called right by name, what was not as a table, and the counts."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.detection.cases import MODEL, TRAFFIC

KINDS = ("model", "traffic", "none")
ON, OFF, BLIND = MODES = ("canary on", "canary off", "neither canary nor inputs")
TRUTHS = {"model": "faults of the model", "traffic": "other traffic", "none": "harmless"}


def kind(state: str) -> str:
    """Whom a state blames."""
    return "model" if state in MODEL else "traffic" if state in TRAFFIC else "none"


@dataclass(frozen=True)
class Line:
    """A case over its runs. kind: whose fault it is; strong: whether it must be found; lost: points of accuracy it
    costs, NaN where that is not known; states: mode -> how many runs ended in each; rivals: those that alarm."""

    name: str
    kind: str
    strong: bool
    lost: float
    states: Mapping[str, Counter[str]]
    rivals: Sequence[str] = ()
    found: Mapping[str, Sequence[int | None]] = field(default_factory=dict)

    def right(self, mode: str) -> bool:
        """Whether every run ended in a state of the case's kind."""
        return all(kind(state) == self.kind for state in self.states[mode])

    @property
    def runs(self) -> int:
        """How many there were."""
        return sum(self.states[OFF].values())


def listed(lines: Sequence[Line]) -> Iterator[str]:
    """The cases: by name where they are right with the canary and without, in a table where they are not."""
    right = [line for line in lines if line.right(ON) and line.right(OFF)]
    wrong = [line for line in lines if line not in right]
    yield f"{len(right)} of {len(lines)} cases are called right in every run, with the canary and without:\n"
    for truth, words in TRUTHS.items():
        names = [_titled(line) for line in right if line.kind == truth]
        if names:
            yield f"- {words}: {'; '.join(names)}"
    if wrong:
        yield "\nThe others, as they end:\n"
        yield "| case | kind | points lost | canary off | canary on | rivals that alarm |\n|---|---|---|---|---|---|"
    for line in wrong:
        lost = "" if math.isnan(line.lost) else f"{line.lost:.1f}"
        cells = [_titled(line), line.kind, lost, _states(line, OFF), _states(line, ON), ", ".join(line.rivals) or "–"]
        yield f"| {' | '.join(cells)} |"


def _titled(line: Line) -> str:
    return f"{line.name}{'' if line.strong or line.kind == 'none' else ' (weak)'}"


def _states(line: Line, mode: str) -> str:
    states = line.states[mode]
    text = ", ".join(s if len(states) == 1 else f"{s} {c}x" for s, c in states.items())
    return text if line.right(mode) else f"**{text}**"


def counted(lines: Sequence[Line], times: Mapping[str, str]) -> Iterator[str]:
    """How many runs of each kind were read as each kind, and what the goals ask for, by mode. times: see `waits`."""
    yield "\n| runs | " + " | ".join(MODES) + " |\n|---" + "|---" * len(MODES) + "|"
    for truth, words in TRUTHS.items():
        of_kind = [line for line in lines if line.kind == truth]
        if of_kind:
            counts = {mode: _counts(of_kind, mode) for mode in MODES}
            cells = (" / ".join(str(counts[mode][read]) for read in KINDS) for mode in MODES)
            yield f"| {words}, read as model / traffic / none | " + " | ".join(cells) + " |"
    faults = [line for line in lines if line.kind != "none"]
    for label, chosen in (("faults", faults), ("strong faults", [line for line in faults if line.strong])):
        alarms = {mode: sum(_counts(chosen, mode)[read] for read in KINDS[:2]) for mode in MODES}
        right = {mode: sum(_counts([line], mode)[line.kind] for line in chosen) for mode in MODES}
        runs = sum(line.runs for line in chosen)
        yield f"| {label} that alarm | " + " | ".join(f"{alarms[mode]} of {runs}" for mode in MODES) + " |"
        shares = (f"{right[mode]} ({right[mode] / max(1, alarms[mode]):.1%})" for mode in MODES)
        yield "| of these on the right side | " + " | ".join(shares) + " |"
    if times:
        cells = (times.get(mode, "–") for mode in MODES)
        yield "| rows until a model's fault is named: median, most | " + " | ".join(cells) + " |"
    rivals = Counter(rival for line in faults for rival in line.rivals)
    if rivals:
        said = ", ".join(f"{name} {count}" for name, count in rivals.most_common())
        yield f"\nRivals, which cannot say whose fault it is, alarm at so many of these {len(faults)} faults: {said}."


def _counts(lines: Sequence[Line], mode: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in lines:
        for state, count in line.states[mode].items():
            total[kind(state)] += count
    return total


def waits(lines: Sequence[Line]) -> dict[str, str]:
    """Mode -> rows until the faults of the model were named as such: the median and the most; and the runs that were
    not. Empty where nobody looked."""
    said = {}
    for mode in (OFF, BLIND):
        rows = [row for line in lines if line.kind == "model" for row in line.found.get(mode, ())]
        times = [row for row in rows if row is not None]
        if times:
            missed = f"; {len(rows) - len(times)} not" if len(times) < len(rows) else ""
            said[mode] = f"{statistics.median(times):.0f}, {max(times)}{missed}"
    return said
