"""Writes what the Helm chart takes from elsewhere: python -m tools.chart

The schema of `settings` in values.schema.json comes from service.settings. The table of objects in
docs/howto/kubernetes.md comes from what the chart renders, and needs helm on the PATH. Both are committed, and tests
compare them with this program's output.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "fullrank"
SCHEMA = CHART / "values.schema.json"
PAGE = ROOT / "docs" / "howto" / "kubernetes.md"
START, END = "<!-- objects: start -->", "<!-- objects: end -->"
# The chart sets these itself, or they are keys, which have no place among plain values.
NOT_VALUES = {"host", "port", "state_dir", "api_key", "api_keys"}
KEPT = ("enum", "minimum", "maximum", "exclusiveMinimum")
RELEASE = "web"
NAME = f"{RELEASE}-fullrank"
# What turns objects on, in the order of the table; the first that shows an object is its value.
VALUES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ()),
    ("persistence.enabled", ()),
    ("autoscaling.enabled", ()),
    ("keda.enabled", ()),
    ("podMonitor.enabled", ()),
    ("prometheusRule.enabled", ()),
    ("podMonitor.enabled, prometheusRule.enabled", ()),
    ("dashboards.enabled", ()),
    ("podDisruptionBudget.enabled", ()),
    ("ingress.enabled", ("ingress.hosts[0].host=embed.example.org",)),
    ("gate.enabled", ("encoder.path=/encoders/new",)),
)
SWITCHES = {"NetworkPolicy": "networkPolicy.enabled", "ServiceAccount": "serviceAccount.create"}  # on by default
PURPOSE = {
    ("Deployment", ""): "the replicas",
    ("StatefulSet", ""): "the replicas instead, each with a volume for its windows",
    ("Service", ""): "where clients send images",
    ("Service", "-replicas"): "a DNS name for each replica, for `fullrank fleet`",
    ("ServiceAccount", ""): "the pods' account; no token is mounted",
    ("NetworkPolicy", ""): "who may reach the pods; nothing may leave them",
    ("HorizontalPodAutoscaler", ""): "more replicas when the CPU is busy",
    ("ScaledObject", ""): "more replicas when images wait (KEDA)",
    ("PodMonitor", ""): "has Prometheus scrape every replica",
    ("PrometheusRule", "-embeddings"): "alerts on collapse, model faults and shifts",
    ("PrometheusRule", "-monitor"): "alerts on the monitor itself",
    ("PrometheusRule", "-recording"): "recorded series of replicas and the fleet",
    ("PrometheusRule", "-serving"): "alerts on errors, slowness, saturation and replicas that are down",
    ("PrometheusRule", "-absent"): "the page when no pod is left to be scraped",
    ("ConfigMap", "-dashboard-fleet"): "Grafana: every replica and encoder",
    ("ConfigMap", "-dashboard-serving"): "Grafana: requests, saturation, CPU",
    ("ConfigMap", "-dashboard-training"): "Grafana: training runs",
    ("PodDisruptionBudget", ""): "one pod at a time when nodes are drained",
    ("Ingress", ""): "the way in from outside the cluster",
    ("Job", "-gate"): "before an upgrade: `fullrank check` of the new encoder; a collapsed one stops it",
}


def settings_schema() -> dict[str, Any]:
    """JSON schema of the chart's `settings`: every setting by name, its type, and its limits where it has any."""
    described = Settings.model_json_schema()["properties"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _value(name, it) for name, it in described.items() if name not in NOT_VALUES},
    }


def _value(name: str, described: dict[str, Any]) -> dict[str, Any]:
    kind = described.get("type", "string")
    kept = {key: described[key] for key in KEPT if key in described}
    if kind == "array":
        return {"type": ["string", "array"], "items": {"type": described["items"]["type"]}}
    if kind == "object":  # NAME=ENCODER, comma-separated
        return {"type": "string"}
    if name == "monitor_rate":
        return {"type": ["number", "string"], "pattern": "^inf$"} | kept
    return {"type": kind} | kept


def schema(text: str) -> str:
    """The schema's text with the present settings in it."""
    whole = json.loads(text)
    whole["properties"]["settings"] = settings_schema()
    return json.dumps(whole, indent=2) + "\n"


def rendered(*settings: str, helm: str = "helm") -> list[tuple[str, str]]:
    """Kind and name of the objects that the chart renders as the release `web`, in Helm's order."""
    command = [helm, "template", RELEASE, str(CHART), *(part for it in settings for part in ("--set", it))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [(it["kind"], it["metadata"]["name"]) for it in yaml.safe_load_all(done.stdout) if it]


def table(helm: str = "helm") -> str:
    """The table of all objects: kind, name, what for, and the value that turns it on."""
    lines = ["| kind | name | what for | value |", "|---|---|---|---|"]
    seen: set[tuple[str, str]] = set()
    for value, more in VALUES:
        switched = [f"{name}=true" for name in value.split(", ") if name]
        for kind, name in rendered(*switched, *more, helm=helm):
            if (kind, name) in seen:
                continue
            seen.add((kind, name))
            default = f"`{SWITCHES[kind]}`, on by default" if kind in SWITCHES else "always"
            on = ", ".join(f"`{it}`" for it in value.split(", ")) if value else default
            lines.append(f"| {kind} | `{name}` | {PURPOSE[kind, name.removeprefix(NAME)]} | {on} |")
    return "\n".join(lines)


def page(text: str, helm: str = "helm") -> str:
    """The page's text with the present table in it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(helm)}\n{END}{after}"


def main() -> None:
    """Write both."""
    SCHEMA.write_text(schema(SCHEMA.read_text()))
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
