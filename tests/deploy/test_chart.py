"""The Helm chart, rendered by the real Helm: every object is valid, and says what the values ask for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tools import kustomize

VERSION = "1.29"
CUSTOM = {"PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule, "ScaledObject": ScaledObject}
CHART = Path(__file__).parents[2] / "deploy" / "helm" / "fullrank"
SETS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*.yaml"))
Objects = dict[tuple[str, str], dict[str, Any]]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary("helm"), *arguments], capture_output=True, text=True, timeout=300)


def binary(name: str) -> str:
    """helm or kubectl, on the PATH or beside this Python."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not on the PATH; `make helm` puts one into .venv/bin")
    return path


def render(values: str, *more: str) -> Objects:
    """(kind, name) -> object of the chart with the values of ci/VALUES-values.yaml, in the namespace `search`."""
    file = CHART / "ci" / f"{values}-values.yaml"
    done = helm("template", "web", str(CHART), "--namespace", "search", "--values", str(file), *more)
    assert done.returncode == 0, done.stderr
    objects = [it for it in yaml.safe_load_all(done.stdout) if it]
    found = {(it["kind"], it["metadata"]["name"]): it for it in objects}
    assert len(found) == len(objects), "two objects of one kind and name"
    return found


def refused(*settings: str) -> str:
    done = helm("template", "web", str(CHART), *(part for it in settings for part in ("--set", it)))
    assert done.returncode != 0
    return done.stderr


def pod(objects: Objects) -> dict[str, Any]:
    """The pod's specification in the one workload."""
    [workload] = [it for (kind, _), it in objects.items() if kind in ("Deployment", "StatefulSet")]
    specification: dict[str, Any] = workload["spec"]["template"]["spec"]
    return specification


def environment(objects: Objects) -> dict[str, Any]:
    return {it["name"]: it.get("value", it.get("valueFrom")) for it in pod(objects)["containers"][0]["env"]}


def test_it_deploys_this_version() -> None:
    from fullrank import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert f"image: fullrank:{__version__}" in (CHART.parents[1] / "kserve" / "inferenceservice.yaml").read_text()


@pytest.mark.parametrize("values", SETS)
def test_every_object_is_valid(values: str) -> None:
    for (kind, name), it in render(values).items():
        if kind in CUSTOM:
            CUSTOM[kind].model_validate(it)
        else:
            kubernetes_validate.validate(it, VERSION, strict=True)
        assert it["metadata"]["labels"]["app.kubernetes.io/instance"] == "web", name


def test_helm_finds_nothing_to_complain_about() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pod_is_confined() -> None:
    for values in SETS:
        for (kind, _), it in render(values).items():
            if kind not in ("Deployment", "StatefulSet", "Job"):
                continue
            specification = it["spec"]["template"]["spec"]
            assert specification["securityContext"]["runAsNonRoot"] is True
            assert specification["automountServiceAccountToken"] is False
            for container in specification["containers"]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] is True
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}


def test_liveness_is_not_readiness() -> None:
    container = pod(render("default"))["containers"][0]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["startupProbe"]["httpGet"]["path"] == "/readyz"
    assert {"name": "http", "containerPort": 8000, "protocol": "TCP"} in container["ports"]


def test_windows_on_a_volume_make_it_a_stateful_set() -> None:
    objects = render("persistent")
    workload = objects["StatefulSet", "web-fullrank"]
    assert workload["spec"]["replicas"] == 3
    [claim] = workload["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "2Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert {"name": "state", "mountPath": "/state"} in pod(objects)["containers"][0]["volumeMounts"]
    assert environment(objects)["FULLRANK_STATE_DIR"] == "/state"


def test_settings_become_variables_the_service_knows() -> None:
    from service.settings import Settings

    objects = render("gpu")
    variables = environment(objects)
    assert variables["FULLRANK_DTYPE"] == "bfloat16"
    assert variables["FULLRANK_MAX_BATCH"] == "256"
    assert variables["FULLRANK_DEVICE"] == "cuda"
    names = {name.removeprefix("FULLRANK_").lower() for name in variables if name.startswith("FULLRANK_")}
    assert names <= set(Settings.model_fields)
    limits = pod(objects)["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "4Gi", "nvidia.com/gpu": "2"}


def test_keys_come_from_secrets() -> None:
    objects = render("secured")
    assert environment(objects)["FULLRANK_API_KEY"] == {"secretKeyRef": {"name": "keys", "key": "embed"}}
    assert pod(objects)["containers"][0]["image"].endswith("@sha256:" + 4 * "0123456789abcdef")
    policy = objects["NetworkPolicy", "web-fullrank"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"]
    assert policy["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.0.0.5/32"}}]
    assert "api_key" in refused("settings.api_key=a-key-in-plain-text")


def test_nothing_leaves_the_pods_by_default() -> None:
    assert render("default")["NetworkPolicy", "web-fullrank"]["spec"]["egress"] == []


def test_keda_asks_for_what_waits_and_never_for_nothing() -> None:
    objects = render("keda")
    scaled = objects["ScaledObject", "web-fullrank"]["spec"]
    assert scaled["minReplicaCount"] >= 1
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
        [content] = objects["ConfigMap", f"web-fullrank-dashboard-{file.stem}"]["data"].values()
        assert json.loads(content) == json.loads(file.read_text())


def test_the_gate_runs_before_an_upgrade() -> None:
    job = render("gated")["Job", "web-fullrank-gate"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    [container] = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    assert command == ["fullrank", "check", "/encoders/new", "--against", "/encoders/old"]
    assert job["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["replicas=many"], "replicas"),
        (["replica=2"], "replica"),
        (["image.digest=latest"], "digest"),
        (["persistence.size=big"], "size"),
        (["settings.Max-Batch=3"], "Max-Batch"),
        (["autoscaling.enabled=true", "keda.enabled=true"], "choose one"),
        (["gate.enabled=true"], "gate.candidate"),
        (["keda.prometheus=prometheus:9090"], "prometheus"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(settings: list[str], says: str) -> None:
    assert says in refused(*settings)


def test_the_kustomize_base_is_the_charts(deploy: Path) -> None:
    base = deploy / "kustomize" / "base"
    written = {path.name: path.read_text() for path in base.iterdir()}
    assert written == kustomize.files(binary("helm"))
    done = subprocess.run([binary("kubectl"), "kustomize", str(base)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds = {it["kind"] for it in yaml.safe_load_all(done.stdout)}
    assert kinds == {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount"}
