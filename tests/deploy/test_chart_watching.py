"""What the Helm chart puts around the pods: scaling, alerts, dashboards, and the gate before an upgrade."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.support.chart import environment, pod, render


def test_keda_asks_for_what_waits_and_never_for_nothing() -> None:
    objects = render("keda", "--set", "keda.cooldownPeriod=90")
    scaled = objects["ScaledObject", "web-fullrank"]["spec"]
    assert scaled["minReplicaCount"] >= 1
    autoscaler = scaled["advanced"]["horizontalPodAutoscalerConfig"]  # KEDA's own cooldown is for the way to none
    assert autoscaler["behavior"]["scaleDown"] == {"stabilizationWindowSeconds": 90}
    assert scaled["triggers"][0]["useCachedMetrics"] is True
    trigger = scaled["triggers"][0]["metadata"]
    assert trigger["query"].startswith("sum(fullrank_pending_images{")
    assert trigger["query"].endswith(" or vector(0)")
    assert trigger["ignoreNullValues"] == "false"
    assert "replicas" not in objects["Deployment", "web-fullrank"]["spec"]


def test_an_autoscaler_scales_the_workload_that_is_there() -> None:
    for values, kind in (("autoscaled", "HorizontalPodAutoscaler"), ("everything", "ScaledObject")):
        objects = render(values)
        target = objects[kind, "web-fullrank"]["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in objects


def test_prometheus_finds_the_pods_and_the_alerts_find_the_job(deploy: Path) -> None:
    import re

    objects = render("watched")
    monitor = objects["PodMonitor", "web-fullrank"]["spec"]
    labels = objects["Deployment", "web-fullrank"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {it["name"] for it in pod(objects)["containers"][0]["ports"]}
    assert endpoint["authorization"] == {"credentials": {"name": "keys", "key": "metrics"}}
    [job] = [it["replacement"] for it in endpoint["relabelings"] if it["targetLabel"] == "job"]
    selectors = re.findall(r'up\{job=~"([^"]+)"', (deploy / "prometheus" / "rules" / "serving.yml").read_text())
    assert len(selectors) == 2
    assert all(re.fullmatch(it, job) for it in selectors)


def test_no_pod_at_all_is_a_page(tmp_path: Path, tool: Callable[[str], str]) -> None:
    """No rule on `up` fires where nothing is scraped."""
    objects = render("watched")
    rules = tmp_path / "absent.yml"
    rules.write_text(yaml.safe_dump(objects["PrometheusRule", "web-fullrank-absent"]["spec"]))
    [endpoint] = objects["PodMonitor", "web-fullrank"]["spec"]["podMetricsEndpoints"]
    job = endpoint["relabelings"][0]["replacement"]
    alert = {"exp_labels": {"severity": "page", "job": job}}
    cases = [
        {"interval": "1m", "input_series": [{"series": f'up{{job="{other}",instance="a"}}', "values": "1x20"}]}
        | {"alert_rule_test": [{"alertname": "EmbeddingServiceDown", "eval_time": "10m", "exp_alerts": expected}]}
        for other, expected in ((job, []), ("photos/web/fullrank", [alert]))
    ]
    annotations = objects["PrometheusRule", "web-fullrank-absent"]["spec"]["groups"][0]["rules"][0]["annotations"]
    alert["exp_annotations"] = annotations
    tests = tmp_path / "absent.test.yml"
    tests.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(tests)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_the_tested_ones(tmp_path: Path, tool: Callable[[str], str], deploy: Path) -> None:
    objects = render("watched")
    for file in (deploy / "prometheus" / "rules").glob("*.yml"):
        rule = objects["PrometheusRule", f"web-fullrank-{file.stem}"]
        assert rule["spec"] == yaml.safe_load(file.read_text())
        assert rule["metadata"]["labels"]["release"] == "prometheus"
        (tmp_path / file.name).write_text(yaml.safe_dump(rule["spec"]))
    files = [str(path) for path in tmp_path.glob("*.yml")]
    done = subprocess.run([tool("promtool"), "check", "rules", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_dashboards_are_the_committed_ones(deploy: Path) -> None:
    objects = render("watched")
    for file in (deploy / "grafana" / "dashboards").glob("*.json"):
        found = objects["ConfigMap", f"web-fullrank-dashboard-{file.stem}"]
        [content] = found["data"].values()
        assert json.loads(content) == json.loads(file.read_text())
        assert len(content) < 2**20, "a ConfigMap holds 1 MiB"
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1", "Grafana's sidecar looks for it"


def test_the_gate_runs_before_an_upgrade() -> None:
    objects = render("gated")
    job = objects["Job", "web-fullrank-gate"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    [container] = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    assert command == ["fullrank", "check", "/encoders/new", "--against", "/encoders/old"]
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    served = environment(objects)["FULLRANK_ENCODER"]
    assert container["command"][2] == served, "what is judged is what will be served"
    gate, service = job["spec"]["template"]["spec"], pod(objects)
    assert gate["tolerations"] == service["tolerations"]
    mounts = {it["mountPath"]: it["name"] for it in container["volumeMounts"]}
    assert mounts == {"/tmp": "tmp", "/encoders": "encoders", "/more": "more"}
    assert set(mounts.values()) == {it["name"] for it in gate["volumes"]}


def test_the_gates_command_says_by_its_exit_code_whether_the_upgrade_goes_on(
    small_artifact: Path, tmp_path: Path
) -> None:
    """The command of the rendered job, run here with its folders in place of the claim's."""
    from dataclasses import replace

    import torch

    from models.artifact import load, save

    [container] = render("gated")["Job", "web-fullrank-gate"]["spec"]["template"]["spec"]["containers"]
    command = [it.replace("/encoders", str(tmp_path)) for it in [*container["command"], *container["args"]]]
    assert command[0] == "fullrank"
    (tmp_path / "old").symlink_to(small_artifact)
    candidate = load(small_artifact)
    for code in (0, 1):
        save(replace(candidate), tmp_path / "new")
        done = subprocess.run([sys.executable, "-m", "cli", *command[1:]], capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        with torch.no_grad():  # every image at one point
            candidate.encoder.eval()
            for parameter in candidate.encoder.parameters():
                parameter.zero_()


def test_a_disruption_budget_lets_a_node_be_drained() -> None:
    """minAvailable: 1 would forbid it for ever where there is one replica."""
    budget = render("autoscaled")["PodDisruptionBudget", "web-fullrank"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget
