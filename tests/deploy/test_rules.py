"""Rules and Alertmanager's configuration, by Prometheus' own tools, and what ties them to the runbooks."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Tool = Callable[[str], str]
Rules = list[dict[str, Any]]
FILES = sorted((Path(__file__).parents[2] / "deploy" / "prometheus" / "tests").glob("*.test.yml"))
SCENARIOS = ("firing", "not firing", "missing data", "restart", "two replicas")


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def rules(deploy: Path) -> Rules:
    """Every rule; an alert's name may stand for a page and a ticket."""
    files = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules: Rules) -> Rules:
    return [rule for rule in rules if "alert" in rule]


@pytest.fixture(scope="module")
def names(alerts: Rules) -> set[str]:
    return {rule["alert"] for rule in alerts}


def test_prometheus_accepts_configuration_and_rules(tool: Tool, deploy: Path) -> None:
    run(tool("promtool"), "check", "config", deploy / "prometheus" / "prometheus.yml")


@pytest.mark.parametrize("file", FILES, ids=lambda it: it.name.removesuffix(".test.yml"))
def test_rules_fire_when_they_should_and_only_then(tool: Tool, file: Path) -> None:
    run(tool("promtool"), "test", "rules", file)


@pytest.mark.parametrize(
    ("alert", "old", "new"),
    [
        ("EmbeddingCompleteCollapse", 'state="complete_collapse"} == 1', 'state="complete_collapse"} >= 0'),
        pytest.param(
            "EmbeddingDirectionsDied",
            'unless on (job, instance, model, revision) fullrank_verdict{state="healthy"} == 1',
            'unless on (job, instance, model, revision) fullrank_verdict{state="none"} == 1',
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_rule_tests_can_fail(tool: Tool, deploy: Path, tmp_path: Path, alert: str, old: str, new: str) -> None:
    rules = (deploy / "prometheus" / "rules" / "embeddings.yml").read_text()
    assert old in rules
    for folder, name, text in (
        ("rules", "embeddings.yml", rules.replace(old, new)),
        ("tests", f"{alert}.test.yml", (deploy / "prometheus" / "tests" / f"{alert}.test.yml").read_text()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    command = [tool("promtool"), "test", "rules", str(tmp_path / "tests" / f"{alert}.test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_every_alert_is_tested_in_every_scenario(deploy: Path, alerts: Rules, names: set[str]) -> None:
    folder = deploy / "prometheus" / "tests"
    assert {file.name.removesuffix(".test.yml") for file in folder.iterdir()} == names | {"recording"}
    for name in names:
        tests = yaml.safe_load((folder / f"{name}.test.yml").read_text())["tests"]
        titles = [test["name"].partition(":")[0] for test in tests]
        for scenario in SCENARIOS:
            assert any(title == scenario or title.startswith(f"{scenario} ") for title in titles), (name, scenario)
        fired = [
            a["exp_labels"]["severity"] for t in tests for r in t.get("alert_rule_test", []) for a in r["exp_alerts"]
        ]
        assert set(fired) == {rule["labels"]["severity"] for rule in alerts if rule["alert"] == name}, name


def test_every_recorded_series_is_tested_and_named_by_its_level(deploy: Path, rules: Rules) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    tests = "".join(file.read_text() for file in (deploy / "prometheus" / "tests").iterdir())
    alerting = "".join(str(rule) for rule in rules if "alert" in rule)
    for name in recorded:
        assert re.fullmatch(r"(instance|instance_rank|model|model_rank|job|fullrank):\w+:\w+", name), name
        kind = name.rpartition(":")[0]  # one window of it is tested by value, or through the alert that reads it
        assert kind in tests or kind in alerting, name


def test_every_alert_says_what_to_do(deploy: Path, alerts: Rules, names: set[str]) -> None:
    for rule in alerts:
        name, annotations = rule["alert"], rule["annotations"]
        assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"
        assert "{{" in annotations["summary"], name  # which replica, or how much
        assert re.search(r"\$value|\| query|value \|", annotations["description"]), f"{name}: no number"
        assert rule["labels"]["severity"] in {"page", "ticket", "info"}
        runbook = (deploy.parent / annotations["runbook_url"]).read_text()
        headings = re.findall(r"^## (.*)$", runbook, re.MULTILINE)
        assert headings == ["What it means", "What to look at", "What to do", "Silence"], name
        (line,) = re.findall(r"^Severity: (.*)\. Rule: `(deploy/prometheus/rules/\w+\.yml)`\.$", runbook, re.MULTILINE)
        assert rule["labels"]["severity"] in line[0], name
        assert f"alert: {name}\n" in (deploy.parent / line[1]).read_text()
        assert "amtool silence add --alertmanager.url=http://127.0.0.1:9093 -d 2h -c" in runbook
        assert f"alertname={name} " in runbook
    assert {path.stem for path in (deploy.parent / "docs" / "runbooks").glob("*.md")} == names


def test_what_the_verdicts_rules_write_is_what_is_committed() -> None:
    from tools.rules import files

    written = files()
    assert {path: path.read_text() for path in written} == written


def test_an_alert_quotes_a_figure_of_every_rule_and_case_that_leads_to_its_state(alerts: Rules) -> None:
    from fullrank.rules import RULES
    from tools.rules import TOLD_BY

    text = {rule["expr"]: rule["annotations"]["description"] for rule in alerts}
    conditions = {case.when for rule in RULES for case in rule.cases}
    assert set(TOLD_BY) <= conditions
    for rule in RULES:
        leads = {rule.state: rule.threshold} | {
            case.state: TOLD_BY.get(case.when, rule.threshold) for case in rule.cases if case.state != rule.state
        }
        for state, threshold in leads.items():
            described = text[f'fullrank_verdict{{state="{state}"}} == 1']
            assert re.search(rf"signal=~?'[^']*\b{threshold}\b", described), (rule, state)


def test_pages_rest_on_the_verdict_and_tickets_on_the_hours(alerts: Rules) -> None:
    from fullrank.rules import STATES

    embeddings = [rule for rule in alerts if "verdict{" in rule["expr"] and rule["labels"]["severity"] != "info"]
    told = {rule["expr"]: (rule["alert"], rule["labels"]["severity"], rule["for"]) for rule in embeddings}
    for state in set(STATES) - {"healthy", "insufficient_data"}:
        name, severity, wait = told.pop(f'fullrank_verdict{{state="{state}"}} == 1')
        assert (severity, wait) == ("page", "1m") or state.startswith("traffic")
        for expression in [it for it in told if f'window="1h",state="{state}"' in it]:
            assert told.pop(expression) == (name, "ticket", "5m")
            assert re.fullmatch(
                r'fullrank_window_verdict{[^}]*} == 1\nunless on \(.*\) fullrank_verdict{state="healthy"} == 1',
                expression,
            )
    assert not told
    pages = [rule for rule in alerts if rule["labels"]["severity"] == "page"]
    assert {rule["for"] for rule in pages} == {"1m"}


def test_no_rule_decides_on_embeddings_a_second_time(rules: Rules) -> None:
    for rule in rules:
        assert "fullrank_threshold" not in rule["expr"], rule


def test_alertmanager_accepts_its_configuration(tool: Tool, deploy: Path) -> None:
    run(tool("amtool"), "check-config", deploy / "alertmanager" / "alertmanager.yml")


def test_inhibitions_name_alerts_and_arrive_in_time(deploy: Path, alerts: Rules, names: set[str]) -> None:
    inhibitions = yaml.safe_load((deploy / "alertmanager" / "alertmanager.yml").read_text())["inhibit_rules"]

    def matching(matchers: list[str]) -> Rules:
        wanted = dict(re.fullmatch(r'(\w+)=~?"(.*)"', matcher).groups() for matcher in matchers)  # type: ignore[union-attr]
        severity, pattern = wanted.get("severity", ".*"), wanted.get("alertname", ".*")
        chosen = [
            r for r in alerts if re.fullmatch(pattern, r["alert"]) and re.fullmatch(severity, r["labels"]["severity"])
        ]
        named = set(re.sub(r".*\(|\).*", "", pattern).split("|")) - {".*"}
        assert all(any(rule["alert"].endswith(name) for rule in chosen) for name in named), matchers
        return chosen

    minutes = {(r["alert"], r["labels"]["severity"]): int(r["for"].removesuffix("m")) for r in alerts}
    for rule in inhibitions:
        for source in matching(rule["source_matchers"]):
            for target in matching(rule["target_matchers"]):
                if "alertname" in rule["equal"] and source["alert"] != target["alert"]:
                    continue
                # A source that fires later than what it mutes lets the page through first.
                key, muted = [(r["alert"], r["labels"]["severity"]) for r in (source, target)]
                assert minutes[key] <= minutes[muted], (key, muted)
                assert not (key[1] == "ticket" and muted[1] == "page")
