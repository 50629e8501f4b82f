"""Writes the alerts and the table in docs/explanation/verdict.md from the verdict's rules.

    python -m tools.rules

Both files are committed, and a test compares them with this program's output.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from fullrank.rules import RULES, STATES, Rule
from fullrank.verdict import CONDITIONS

ROOT = Path(__file__).resolve().parents[1]
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "embeddings.yml"
PAGE = ROOT / "docs" / "explanation" / "verdict.md"
START, END = "<!-- rules: start -->", "<!-- rules: end -->"
WIDTH = 120
WINDOWS = {"5m": "five minutes", "1h": "an hour"}

HEADER = """\
# Written by python -m tools.rules from fullrank/rules.py, the verdict's table: change that.
# Alerts on recent embeddings, one per replica and encoder: in a sum over replicas three healthy ones hide a collapsed
# one. The service judges, by the encoder's own thresholds; these rules only wait. `fullrank_verdict` is on what passes
# now and gives the pages. `fullrank_window_verdict{window="1h"}` is on the rows of the hour alone and gives tickets,
# which are silent where the verdict is that all is well again. Each is a state set: exactly one state is 1. Not knowing
# is a state of its own, so it never pages. docs/decisions/verdict-and-pages.md says why.
groups:
  - name: embeddings
    rules:
"""


@dataclass(frozen=True)
class Alert:
    """The alert for a state: its name, severity, waiting time and words."""

    name: str
    severity: str
    wait: str
    summary: str
    meaning: str
    hour: bool = False  # a ticket of the same name reads the hour


TOLD = {
    "model_fault": Alert(
        "EmbeddingModelFault",
        "page",
        "1m",
        "no longer embeds as it did",
        "The model, its preprocessing, its precision or its hardware is at fault: the canary images embed elsewhere, "
        "or, where none was embedded lately, the embeddings strayed while the traffic stayed what it was.",
    ),
    "complete_collapse": Alert(
        "EmbeddingCompleteCollapse",
        "page",
        "1m",
        "embeds every image to nearly one point",
        "Any search over these embeddings returns noise.",
        hour=True,
    ),
    "dimensional_collapse": Alert(
        "EmbeddingDirectionsDied",
        "page",
        "1m",
        "has let its embeddings fall into a subspace",
        "Directions that carry variance in healthy embeddings carry none.",
        hour=True,
    ),
    "traffic_shifted": Alert(
        "EmbeddingTrafficShifted",
        "ticket",
        "5m",
        "sees images unlike those of its reference",
        "The embeddings strayed with their images: foreign images, or a client that prepares them differently "
        "(inverted, wrongly scaled, cropped).",
    ),
    "traffic_narrowed": Alert(
        "EmbeddingTrafficNarrowed",
        "ticket",
        "1m",
        "sees less varied images than its reference did",
        "The encoder is intact and the traffic is narrower; the rank falls with it.",
    ),
}
# Threshold -> the value's name in the annotation, its query over a window, and its format.
FIGURES = {
    "canary_cosine": (
        "least cosine of a canary image to the stored one",
        "fullrank_canary_cosine_min{%s}",
        "%.4f",
    ),
    "canary_angle": (
        "largest angle of a canary image to the stored one, degrees",
        "fullrank_canary_angle_degrees{quantile='1',%s}",
        "%.2f",
    ),
    "canary_participation_ratio": (
        "participation ratio of the canary images",
        "fullrank_canary_participation_ratio{%s}",
        "%.1f",
    ),
    "zero_share": ("share of rows that are zeros", "fullrank_zero_share{window='WINDOW',%s}", "%.2f"),
    "shared_answers": ("share of rows that equal the row of another image", "fullrank_shared_answers{%s}", "%.2f"),
    "input_correlation": (
        "distance correlation of answers and inputs, at most",
        "fullrank_input_correlation{bound='upper',%s}",
        "%.2f",
    ),
    "total_variance": ("total variance", "fullrank_total_variance{window='WINDOW',%s}", "%.2g"),
    "numerical_rank": ("directions with variance", "fullrank_numerical_rank{window='WINDOW',%s}", "%.0f"),
    "tail_energy_ratio_gone": (
        "weakest trailing band, at most",
        "min(fullrank_band_energy_ratio{window='WINDOW',part='tail',bound='upper',%s})",
        "%.2f",
    ),
    "tail_energy_ratio_high": (
        "strongest trailing band",
        "max(fullrank_band_energy_ratio{window='WINDOW',part='tail',bound='estimate',%s})",
        "%.1f",
    ),
    "head_energy_ratio_low": (
        "leading directions, of their variance",
        "fullrank_head_energy_ratio{window='WINDOW',bound='estimate',%s}",
        "%.2f",
    ),
    "participation_ratio": (
        "participation ratio",
        "fullrank_participation_ratio{window='WINDOW',bound='estimate',%s}",
        "%.1f",
    ),
    "mean_shift_ratio": ("shift of the mean", "fullrank_mean_shift_ratio{%s}", "%.2f"),
    "tail_shift": ("shift of the mean in the tail", "fullrank_tail_shift{%s}", "%.3f"),
    "evidence": ("evidence of the sequential test", "fullrank_evidence{%s}", "%.1f"),
}
# Shown through the weakest band already.
SHOWN_ELSEWHERE = {"tail_energy_ratio_low"}


def value(query: str, form: str) -> str:
    """An annotation template that queries Prometheus for a value of the alert's own replica and encoder.

    A value that is NaN, since too few rows determine it, reads as unknown: it is not above -Inf.
    """
    labels = "instance='%s',model='%s',revision='%s'"
    asked = f"{query.replace('%s', labels)} > -Inf"
    return (
        f"{{{{ with printf `{asked}` $labels.instance $labels.model $labels.revision | query }}}}"
        f'{{{{ . | first | value | printf "{form}" }}}}{{{{ else }}}}unknown{{{{ end }}}}'
    )


def description(state: str, window: str) -> str:
    """The description of an alert: the state's meaning, and the figures that its rules compare."""
    rules = {rule.threshold: rule for rule in RULES if rule.state == state and rule.threshold not in SHOWN_ELSEWHERE}
    figures = []
    for threshold, rule in rules.items():
        name, query, form = FIGURES[threshold]
        limit = value(f"fullrank_threshold{{signal='{threshold}',%s}}", form)
        figures.append(f"{name} {value(query.replace('WINDOW', window), form)}, abnormal {rule.side} {limit}")
    return (
        f"{TOLD[state].meaning} Over {WINDOWS[window]}: {'; '.join(figures)}. GET /spectrum on the instance gives the "
        "reason in words."
    )


def alert(state: str, severity: str, wait: str, expression: str, window: str) -> str:
    """One rule of the file."""
    it = TOLD[state]
    folded = textwrap.wrap(description(state, window), WIDTH - 12, break_long_words=False, break_on_hyphens=False)
    several = expression.split("\n")
    lines = [
        f"      - alert: {it.name}",
        *([f"        expr: {expression}"] if len(several) == 1 else ["        expr: |-"]),
        *(f"          {line}" for line in several if len(several) > 1),
        f"        for: {wait}",
        f"        labels: {{severity: {severity}}}",
        "        annotations:",
        f'          summary: "{{{{ $labels.instance }}}}: {{{{ $labels.model }}}} {it.summary}"',
        "          description: >-",
        *(f"            {line}" for line in folded),
        f"          runbook_url: docs/runbooks/{it.name}.md",
    ]
    return "\n".join(lines) + "\n"


def alerts() -> str:
    """The file of alerts: one rule for each state with an alert, and for some states one more on the hour."""
    rules = []
    for state in reversed(STATES):
        it = TOLD.get(state)
        if it is None:
            continue
        rules.append(alert(state, it.severity, it.wait, f'fullrank_verdict{{state="{state}"}} == 1', "5m"))
        if it.hour:
            hour = (
                f'fullrank_window_verdict{{window="1h",state="{state}"}} == 1\n'
                'unless on (job, instance, model, revision) fullrank_verdict{state="healthy"} == 1'
            )
            rules.append(alert(state, "ticket", "5m", hour, "1h"))
    return HEADER + "\n".join(rules)


def table() -> str:
    """The verdict's rules as a Markdown table, in the order in which they are tried."""
    lines = ["| signal | read on | abnormal | by | state | except where | then |", "|---|---|---|---|---|---|---|"]
    for rule in RULES:
        assert all(case.when in CONDITIONS for case in rule.cases)
        cases = [case for case in rule.cases if case.state != rule.state]  # others give the reason other words
        for i, case in enumerate(cases or [None]):
            cells = row(rule) if i == 0 else [""] * 5
            cells += ["", ""] if case is None else [case.when, f"`{case.state}`"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row(rule: Rule) -> list[str]:
    return [rule.signal, rule.window, f"{rule.side} `{rule.threshold}`", rule.reading, f"`{rule.state}`"]


def files() -> dict[Path, str]:
    """The content of each file."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    return {ALERTS: alerts(), PAGE: f"{before}{START}\n{table()}\n{END}{after}"}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
