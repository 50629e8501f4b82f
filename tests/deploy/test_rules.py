"""Rules and Alertmanager's configuration, by Prometheus' own tools, and what ties them to the runbooks."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Tool = Callable[[str], str]


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def alerts(deploy: Path) -> dict[str, Any]:
    """name -> rule, of every alert."""
    files = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def test_prometheus_accepts_configuration_and_rules(tool: Tool, deploy: Path) -> None:
    run(tool("promtool"), "check", "config", deploy / "prometheus" / "prometheus.yml")


def test_rules_fire_when_they_should_and_only_then(tool: Tool, deploy: Path) -> None:
    run(tool("promtool"), "test", "rules", *sorted((deploy / "prometheus" / "tests").glob("*.test.yml")))


def test_the_rule_tests_can_fail(tool: Tool, deploy: Path, tmp_path: Path) -> None:
    rules = (deploy / "prometheus" / "rules" / "embeddings.yml").read_text()
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "rules" / "embeddings.yml").write_text(rules.replace('bound="upper"', 'bound="lower"'))
    test = tmp_path / "tests" / "embeddings.test.yml"
    test.write_text((deploy / "prometheus" / "tests" / "embeddings.test.yml").read_text())
    done = subprocess.run([tool("promtool"), "test", "rules", test], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "EmbeddingRankCollapse" in done.stdout + done.stderr


def test_every_alert_is_unit_tested(deploy: Path, alerts: dict[str, Any]) -> None:
    tests = "".join(file.read_text() for file in (deploy / "prometheus" / "tests").glob("*.test.yml"))
    assert set(alerts) == set(re.findall(r'alertname[:=] ?"?(Embedding\w+)', tests))


def test_every_alert_says_what_to_do(deploy: Path, alerts: dict[str, Any]) -> None:
    for name, rule in alerts.items():
        annotations = rule["annotations"]
        assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"
        assert {"summary", "description"} <= set(annotations)
        assert rule["labels"]["severity"] in {"page", "ticket", "info"}
        runbook = (deploy.parent / annotations["runbook_url"]).read_text()
        headings = re.findall(r"^## (.*)$", runbook, re.MULTILINE)
        assert headings == ["What it means", "What to look at", "What to do", "Silence"], name
        assert f"Severity: {rule['labels']['severity']}." in runbook
    assert {path.stem for path in (deploy.parent / "docs" / "runbooks").glob("*.md")} == set(alerts)


def test_pages_come_within_minutes_from_the_five_minute_window(alerts: dict[str, Any]) -> None:
    pages = {name: rule for name, rule in alerts.items() if rule["labels"]["severity"] == "page"}
    assert {"EmbeddingRankCollapse", "EmbeddingCompleteCollapse", "EmbeddingDimensionalCollapse"} <= set(pages)
    for rule in pages.values():
        assert rule["for"] == "1m"
        assert set(re.findall(r'window="(\w+)"', rule["expr"])) <= {"5m"}


def test_alertmanager_accepts_its_configuration(tool: Tool, deploy: Path) -> None:
    run(tool("amtool"), "check-config", deploy / "alertmanager" / "alertmanager.yml")


def test_inhibitions_name_alerts_and_keep_the_reason(deploy: Path, alerts: dict[str, Any]) -> None:
    rules = yaml.safe_load((deploy / "alertmanager" / "alertmanager.yml").read_text())["inhibit_rules"]

    def named(matcher: str) -> set[str]:
        pattern = re.fullmatch(r'alertname=~?"(.*)"', matcher)
        assert pattern, matcher
        return {name for name in alerts if re.fullmatch(pattern[1], name)}

    mutes = {
        source: named(rule["target_matchers"][0]) for rule in rules for source in named(rule["source_matchers"][0])
    }
    everything = {name for name in alerts if "Monitor" not in name and "Insufficient" not in name}
    assert mutes["EmbeddingModelFault"] == everything - {"EmbeddingModelFault"}
    assert mutes["EmbeddingTrafficNarrowed"] == {"EmbeddingRankCollapse"}
    assert all(source not in muted for source, muted in mutes.items())
    # A source that fires later than what it mutes lets the page through first.
    minutes = {name: int(rule["for"].removesuffix("m")) for name, rule in alerts.items()}
    assert all(minutes[source] <= minutes[target] for source, targets in mutes.items() for target in targets)
