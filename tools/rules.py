"""Writes the alerts and the table in docs/explanation/verdict.md from the verdict's rules.

    python -m tools.rules

Both files are committed, and a test compares them with this program's output.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from fullrank.reading import CONDITIONS
from fullrank.rules import RULES, STATES, Rule

ROOT = Path(__file__).resolve().parents[1]
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "embeddings.yml"
PAGE = ROOT / "docs" / "explanation" / "verdict.md"
START, END = "<!-- rules: start -->", "<!-- rules: end -->"
WIDTH = 120
WINDOWS = {"5m": "five minutes", "1h": "an hour"}
# Where no figure is known to be beyond its threshold.
NONE = {"5m": "unknown, for the verdict rests on other rows, or on what has no figure", "1h": "unknown"}

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
        "The model, its preprocessing, its precision, its hardware or what hands out its answers is at fault: the "
        "canary images embed elsewhere, answers are not those of their images, or, where no canary was embedded "
        "lately, the embeddings strayed while the traffic stayed what it was.",
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
        "The embeddings vary in fewer directions than healthy ones: some of those hold too little variance, or all of "
        "it lies in another, smaller subspace.",
        hour=True,
    ),
    "traffic_shifted": Alert(
        "EmbeddingTrafficShifted",
        "ticket",
        "5m",
        "sees images unlike those of its reference",
        "The embeddings strayed with their images: foreign images, a client that prepares them differently (inverted, "
        "wrongly scaled, cropped), or a few images that come often. Where the inputs are not measured, the service's "
        "own preprocessing may have changed.",
    ),
    "traffic_narrowed": Alert(
        "EmbeddingTrafficNarrowed",
        "ticket",
        "1m",
        "sees less varied images than its reference did",
        "The images are less varied, or come again and again, and the rank falls with them. A reference that is not "
        "calibrated cannot tell this from an encoder that lost directions.",
    ),
}
# Threshold -> the value's name in the annotation, its query over a window, and its format. Estimates, not bounds: the
# rows since a change are judged by these.
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
        "distance correlation of answers and inputs",
        "fullrank_input_correlation{bound='estimate',%s}",
        "%.2f",
    ),
    "total_variance": ("total variance", "fullrank_total_variance{window='WINDOW',%s}", "%.2g"),
    "numerical_rank": ("directions with variance", "fullrank_numerical_rank{window='WINDOW',%s}", "%.0f"),
    "tail_energy_ratio_gone": (
        "weakest trailing band",
        "min by (OWN) (fullrank_band_energy_ratio{window='WINDOW',part='tail',bound='estimate',%s})",
        "%.2f",
    ),
    "tail_energy_ratio_high": (
        "strongest trailing band",
        "max by (OWN) (fullrank_band_energy_ratio{window='WINDOW',part='tail',bound='estimate',%s})",
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
    "participation_ratio_collapse": (
        "participation ratio",
        "fullrank_participation_ratio{window='WINDOW',bound='estimate',%s}",
        "%.1f",
    ),
    "input_distance": ("distance of the inputs from the reference's", "fullrank_input_distance{%s}", "%.1f"),
    "mean_shift_ratio": ("shift of the mean", "fullrank_mean_shift_ratio{%s}", "%.2f"),
    "tail_shift": ("shift of the mean in the tail", "fullrank_tail_shift{%s}", "%.3f"),
    "evidence": ("evidence of the sequential test", "fullrank_evidence{%s}", "%.1f"),
}
# A case whose condition compares a figure of its own is told by that one, whatever the rule that it belongs to.
TOLD_BY = {
    "ratio collapsed, not calibrated": "participation_ratio_collapse",
    "ratio collapsed, inputs not known to differ": "participation_ratio_collapse",
    "inputs are usual, ratio collapsed, no recent canary": "participation_ratio_collapse",
    "inputs are foreign": "input_distance",
    "inputs differ, recent canary": "input_distance",
    "inputs differ, recent canary, variance left": "input_distance",
}
ABOVE = {"input_distance"} | {rule.threshold for rule in RULES if rule.side == "above"}
# The last trailing band, which no query can pick, is told with the weakest one.
LAST_BAND, ANY_BAND = "tail_energy_ratio_low", "tail_energy_ratio_gone"
OWN = "job, instance, model, revision"


def told(state: str) -> list[str]:
    """The thresholds that a verdict of this state may rest on: those of its rules, then those of cases."""
    own = [rule.threshold for rule in RULES if rule.state == state]
    cases = [TOLD_BY.get(case.when, rule.threshold) for rule in RULES for case in rule.cases if case.state == state]
    return [it for it in dict.fromkeys(own + cases) if it != LAST_BAND]


def limit(threshold: str, form: str) -> str:
    """An annotation template for a threshold of the alert's own replica and encoder."""
    asked = f"printf `fullrank_threshold{{signal='{threshold}',%s}} > -Inf` $of | query"
    return f'{{{{ with {asked} }}}}{{{{ . | first | value | printf "{form}" }}}}{{{{ else }}}}unknown{{{{ end }}}}'


def figure(threshold: str, window: str) -> str:
    """An annotation template for a signal's value and threshold. It is empty where the value is not beyond it."""
    name, query, form = FIGURES[threshold]
    side = "above" if threshold in ABOVE else "below"
    limits = f"{side} {limit(threshold, form)}"
    least = f"fullrank_threshold{{signal='{threshold}',%s}}"
    if threshold == ANY_BAND:
        limits += f", the last one below {limit(LAST_BAND, form)}"
        least = f"max by (OWN) (fullrank_threshold{{signal=~'{ANY_BAND}|{LAST_BAND}',%s}})"
    asked = f"{query} {'>' if side == 'above' else '<'} on (OWN) {least}"
    asked = asked.replace("WINDOW", window).replace("OWN", OWN).replace("%s", "%[1]s")
    return (
        f"{{{{ with printf `{asked}` $of | query }}}}{{{{ $and }}}}{name} "
        f'{{{{ . | first | value | printf "{form}" }}}}, abnormal {limits}{{{{ $and = "; " }}}}{{{{ end }}}}'
    )


def description(state: str, window: str) -> str:
    """The description of an alert: the state's meaning, and those figures behind it that are beyond their thresholds.

    A verdict may rest on one of many figures, and one that did not matter would mislead. So only those are written that
    are beyond their thresholds. A value or a threshold that is NaN, since too few rows determine it, is not.
    """
    figures = "".join(figure(threshold, window) for threshold in told(state))
    return (
        "{{ $of := printf `instance='%s',model='%s',revision='%s'` $labels.instance $labels.model $labels.revision }}"
        f'{{{{ $and := "" }}}}{TOLD[state].meaning} Over {WINDOWS[window]}: {figures}'
        f"{{{{ if not $and }}}}{NONE[window]}{{{{ end }}}}. GET /spectrum on the instance gives the reason in words."
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
