"""The Grafana files: that their program writes them, that Grafana's own models read them, and that they agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

BOARDS = ("fleet", "serving", "training")


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest, deploy: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((deploy / "grafana" / "dashboards" / f"{request.param}.json").read_text())
    return content


def provisioning(deploy: Path, kind: str) -> Any:
    return yaml.safe_load((deploy / "grafana" / "provisioning" / kind).read_text())


def test_the_committed_files_are_what_their_program_writes() -> None:
    from tools.grafana.__main__ import HERE, files

    written = files()
    assert {path: path.read_text() for path in written} == written
    for folder in ("dashboards", "provisioning/alerting"):
        assert set((HERE / folder).iterdir()) == {path for path in written if path.parent == HERE / folder}


def test_dashboards_survive_the_sdks_models(board: dict[str, Any]) -> None:
    from grafana_foundation_sdk.models.dashboard import Dashboard

    from tools.grafana.__main__ import plain

    assert plain(Dashboard.from_json(board)) == board


def test_alert_rules_survive_the_sdks_models(deploy: Path) -> None:
    from grafana_foundation_sdk.models.alerting import ContactPoint, NotificationPolicy, Rule

    from tools.grafana.__main__ import plain

    for group in provisioning(deploy, "alerting/rules.yml")["groups"]:
        for rule in group["rules"]:
            of_api = rule | {"ruleGroup": group["name"], "folderUID": group["folder"], "orgID": group["orgId"]}
            assert plain(Rule.from_json(of_api)) == of_api
    (contact,) = provisioning(deploy, "alerting/contact-points.yml")["contactPoints"]
    assert all(plain(ContactPoint.from_json(receiver)) == receiver for receiver in contact["receivers"])
    (policy,) = provisioning(deploy, "alerting/policies.yml")["policies"]
    assert plain(NotificationPolicy.from_json(policy)) == {k: v for k, v in policy.items() if k != "orgId"}


def test_panels_neither_overlap_nor_leave_the_grid(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_panel_says_what_healthy_looks_like(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["type"] == "row" or len(panel["description"]) > 10, panel["title"]
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_heatmap_avoids_the_format_that_subtracts_series(deploy: Path) -> None:
    fleet = json.loads((deploy / "grafana" / "dashboards" / "fleet.json").read_text())
    (heatmap,) = [panel for panel in fleet["panels"] if panel["type"] == "heatmap"]
    assert [target["format"] for target in heatmap["targets"]] == ["time_series"]
    assert heatmap["targets"][0]["legendFormat"] == "{{rank}}"
    assert heatmap["options"]["calculate"] is False
    assert (heatmap["options"]["color"]["min"], heatmap["options"]["color"]["max"]) == (0, 1.5)


def test_grafanas_alerts_are_the_prometheus_ones(deploy: Path) -> None:
    files = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    shipped = {
        f"{rule['alert']} ({rule['labels']['severity']})": rule
        for group in groups
        for rule in group["rules"]
        if "alert" in rule and rule["labels"]["severity"] != "info"
    }
    rules = [r for group in provisioning(deploy, "alerting/rules.yml")["groups"] for r in group["rules"]]
    assert {rule["title"] for rule in rules} == set(shipped)
    source = provisioning(deploy, "datasources/prometheus.yml")["datasources"][0]["uid"]
    boards = {json.loads((deploy / "grafana" / "dashboards" / f"{name}.json").read_text())["uid"] for name in BOARDS}
    for rule in rules:
        same = shipped[rule["title"]]
        query, threshold = rule["data"]
        assert (query["model"]["expr"], rule["for"], rule["labels"]) == (same["expr"], same["for"], same["labels"])
        assert (query["datasourceUid"], threshold["datasourceUid"]) == (source, "__expr__")
        assert rule["annotations"]["runbook_url"] == same["annotations"]["runbook_url"]
        assert rule["annotations"]["dashboard"].removeprefix("/d/") in boards
        summary = rule["annotations"]["summary"]
        assert not re.search(r"\$value\b|\$\$", summary)
        # Grafana expands $NAME from the environment, in everything but annotations.
        assert "$" not in json.dumps(rule | {"annotations": {}})
        assert "query" not in summary  # which Grafana's templates lack
        assert re.fullmatch(r"[\w-]{1,40}", rule["uid"])  # Grafana refuses more
    assert len({rule["uid"] for rule in rules}) == len(rules)


def test_grafana_groups_an_incident_as_alertmanager_does(deploy: Path) -> None:
    (policy,) = provisioning(deploy, "alerting/policies.yml")["policies"]
    (contact,) = provisioning(deploy, "alerting/contact-points.yml")["contactPoints"]
    route = yaml.safe_load((deploy / "alertmanager" / "alertmanager.yml").read_text())["route"]
    assert policy["receiver"] == contact["name"]
    assert all(policy[key] == route[key] for key in ("group_by", "group_wait", "group_interval", "repeat_interval"))
    assert contact["receivers"][0]["settings"]["url"] == "$GRAFANA_WEBHOOK_URL"
    assert "GRAFANA_WEBHOOK_URL" in (deploy.parent / "docker-compose.yml").read_text()
