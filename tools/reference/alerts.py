"""docs/reference/alerts.md: every alert with its severity, its waiting time and its runbook, from the rule files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.reference.text import table

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules"
HEAD = """# Alerts

The rules are in `deploy/prometheus/rules`; `fullrank rules DIR` writes those of an installed version. A page should
wake somebody. A ticket can wait for the morning. Each alert has a runbook: what it means, what to look at, what to do.
`python -m tools.reference` writes this page from the rules.

"""


def alerts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each alerting rule and the file that it is in."""
    for file in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    yield file.name, rule


def page() -> str:
    found: dict[str, dict[str, list[str]]] = {}
    for file, rule in alerts():
        of = found.setdefault(rule["alert"], {"severity": [], "wait": [], "file": [file]})
        of["severity"].append(rule["labels"]["severity"])
        of["wait"].append(rule.get("for", "0s"))
    rows = (
        (f"[{name}](../runbooks/{name}.md)", ", ".join(it["severity"]), ", ".join(it["wait"]), f"`{it['file'][0]}`")
        for name, it in found.items()
    )
    return HEAD + table(("alert and its runbook", "severity", "fires after", "file"), rows)
