"""The shipped alert rules at fifteen times their speed."""

import re
from pathlib import Path

import yaml

from tools.stack import RULES

HURRY = 15  # times: five minutes pass in twenty seconds
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def sped_up(text: str) -> str:
    """A Prometheus duration, shortened: "1m" -> "4s", at least a second."""
    number, unit = re.fullmatch(r"(\d+)([smhd])", text).groups()  # type: ignore[union-attr]
    return f"{max(1, round(int(number) * _UNITS[unit] / HURRY))}s"


def sped_up_rules(folder: Path) -> Path:
    """The shipped rules with every `for` and every range shortened and nothing else changed, in `folder`."""
    folder.mkdir()
    for file in sorted(RULES.glob("*.yml")):
        content = yaml.safe_load(file.read_text())
        for rule in (rule for group in content["groups"] for rule in group["rules"]):
            rule["expr"] = re.sub(r"\[(\d+[smhd])\]", lambda found: f"[{sped_up(found[1])}]", rule["expr"])
            for key in {"for", "keep_firing_for"} & rule.keys():
                rule[key] = sped_up(rule[key])
        (folder / file.name).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder
