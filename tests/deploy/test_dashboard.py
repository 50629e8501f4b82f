"""The Grafana files: that they are what their program writes, and that they agree with the Prometheus rules."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def dashboard(deploy: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((deploy / "grafana" / "dashboards" / "fullrank.json").read_text())
    return content


def test_the_committed_dashboard_is_what_its_program_writes(dashboard: dict[str, Any]) -> None:
    from deploy.grafana.dashboard import dashboard as written

    assert dashboard == json.loads(json.dumps(written()))


def test_panels_neither_overlap_nor_leave_the_grid(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_heatmap_avoids_the_format_that_subtracts_series(dashboard: dict[str, Any]) -> None:
    (heatmap,) = [panel for panel in dashboard["panels"] if panel["type"] == "heatmap"]
    assert [target["format"] for target in heatmap["targets"]] == ["time_series"]
    assert heatmap["targets"][0]["legendFormat"] == "{{rank}}"
    assert heatmap["options"]["calculate"] is False


def test_the_grafana_alert_is_the_prometheus_rule(deploy: Path) -> None:
    provisioned = yaml.safe_load((deploy / "grafana" / "provisioning" / "alerting" / "rank-collapse.yml").read_text())
    (rule,) = provisioned["groups"][0]["rules"]
    groups = yaml.safe_load((deploy / "prometheus" / "rules" / "embeddings.yml").read_text())["groups"]
    (shipped,) = [r for g in groups for r in g["rules"] if r.get("alert") == rule["title"]]
    assert rule["data"][0]["model"]["expr"] == shipped["expr"]
    assert rule["for"] == shipped["for"]
    assert rule["labels"] == shipped["labels"]
    assert rule["annotations"]["runbook_url"] == shipped["annotations"]["runbook_url"]
    # Grafana expands $NAME from the environment in these files; templates need $$.
    assert "$$labels" in rule["annotations"]["summary"]
    source = yaml.safe_load((deploy / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert rule["data"][0]["datasourceUid"] == source["datasources"][0]["uid"]
    assert rule["notification_settings"]["receiver"] == provisioned["contactPoints"][0]["name"]
