"""Converts the Prometheus alerts to Grafana-managed ones, as provisioning files for those who alert from Grafana.

Expressions, waiting times and labels are those of deploy/prometheus/rules. Grafana's templates cannot query
Prometheus, so annotations keep only what their own sample tells, and link to the dashboard for the rest. Alerts of
severity info are for dashboards and are left out.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import alerting, expr
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.alerting import ContactPoint, NotificationPolicy, RelativeTimeRange, Rule

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules"
ALERTMANAGER = Path(__file__).resolve().parents[2] / "deploy" / "alertmanager" / "alertmanager.yml"
RECEIVER = "fullrank webhook"
FOLDER = "fullrank"
DASHBOARD = {"embeddings": "fullrank-fleet", "embedding-monitor": "fullrank-fleet", "serving": "fullrank-serving"}


def rules() -> dict[str, list[Rule]]:
    """group -> its rules."""
    groups = [g for file in sorted(RULES.glob("*.yml")) for g in yaml.safe_load(file.read_text())["groups"]]
    alerts = {
        g["name"]: [r for r in g["rules"] if r.get("labels", {}).get("severity", "info") != "info"] for g in groups
    }
    return {group: [rule(group, shipped) for shipped in members] for group, members in alerts.items() if members}


def rule(group: str, shipped: dict[str, Any]) -> Rule:
    """A Grafana rule. Query A is the expression, which returns the series that are wrong. B tests if there are any."""
    title = shipped["alert"]
    severity = shipped["labels"]["severity"]
    annotations = shipped["annotations"]
    words = re.sub(r"(?=[A-Z])", "-", title.removeprefix("Embedding")).lower()
    anything = expr.ExprTypeThresholdConditionsEvaluator().type("gt").params([-1])  # none of our values is negative
    threshold = expr.TypeThreshold().ref_id("B").expression("A")
    recent = RelativeTimeRange(from_val=600, to=0)
    expression = alerting.Query("A").datasource_uid("prometheus").relative_time_range(recent)
    condition = alerting.Query("B").datasource_uid("__expr__").relative_time_range(recent)
    return (
        alerting.Rule(f"{title} ({severity})")
        .uid(f"{FOLDER}{words}-{severity}")
        .folder_uid(FOLDER)
        .rule_group(group)
        .org_id(1)
        .with_query(expression.model(Dataquery().ref_id("A").expr(shipped["expr"]).instant()))
        .with_query(condition.model(threshold.conditions([expr.ExprTypeThresholdConditions().evaluator(anything)])))
        .condition("B")
        .for_val(shipped["for"])
        .no_data_state("OK")  # a rule that filters has no series in health
        .exec_err_state("Error")  # Prometheus out of reach
        .labels(shipped["labels"])
        .annotations(
            {
                # $value is a sentence in Grafana; the number of query A is this. Annotations, alone in these files, are
                # not expanded from the environment, so that their dollars need no second one.
                "summary": annotations["summary"].replace("$value ", "$values.A.Value "),
                "runbook_url": annotations["runbook_url"],
                "dashboard": f"/d/{DASHBOARD[group]}",
            }
        )
        .build()
    )


def contact_point() -> ContactPoint:
    settings = {"url": "$GRAFANA_WEBHOOK_URL", "httpMethod": "POST"}
    return alerting.ContactPoint().name(RECEIVER).uid("fullrank-webhook").type("webhook").settings(settings).build()


def policy() -> NotificationPolicy:
    """Alertmanager's grouping and patience. Grafana has no inhibition: the group makes an incident one message."""
    route = yaml.safe_load(ALERTMANAGER.read_text())["route"]
    return (
        alerting.NotificationPolicy()
        .receiver(RECEIVER)
        .group_by(route["group_by"])
        .group_wait(route["group_wait"])
        .group_interval(route["group_interval"])
        .repeat_interval(route["repeat_interval"])
        .build()
    )


def provisioned(plain: Any) -> dict[str, dict[str, Any]]:
    """File name -> content, in the shape that Grafana reads from files; `plain` turns a model into plain data."""

    def of_file(rule: Rule) -> dict[str, Any]:
        of_api = plain(rule)  # the file says these three once, of the group
        return {key: value for key, value in of_api.items() if key not in {"folderUID", "ruleGroup", "orgID"}}

    groups = [
        {
            "orgId": 1,
            "name": name,
            "folder": FOLDER,
            "interval": "30s",
            "rules": [of_file(r) for r in members],
        }
        for name, members in rules().items()
    ]
    receiver = {key: value for key, value in plain(contact_point()).items() if key != "name"}
    return {
        "rules.yml": {"apiVersion": 1, "groups": groups},
        "contact-points.yml": {
            "apiVersion": 1,
            "contactPoints": [{"orgId": 1, "name": RECEIVER, "receivers": [receiver]}],
        },
        "policies.yml": {"apiVersion": 1, "policies": [{"orgId": 1} | plain(policy())]},
    }
