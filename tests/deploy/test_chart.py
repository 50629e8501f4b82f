"""The Helm chart, rendered by the real Helm: every object is valid, and says what the values ask for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tools import chart, kustomize

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
            # What it does not know it leaves out instead of refusing it.
            assert CUSTOM[kind].model_validate(it).model_dump(by_alias=True, exclude_unset=True, mode="json") == it
        else:
            kubernetes_validate.validate(it, VERSION, strict=True)
        assert it["metadata"]["labels"]["app.kubernetes.io/instance"] == "web", name


def test_helm_finds_nothing_to_complain_about() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def every_pod() -> Iterator[dict[str, Any]]:
    """The specification of each pod of each set of values: the service's and the gate's."""
    for values in SETS:
        for (kind, _), it in render(values).items():
            if kind in ("Deployment", "StatefulSet", "Job"):
                yield it["spec"]["template"]["spec"]


def test_the_pod_is_confined() -> None:
    for specification in every_pod():
        assert specification["securityContext"]["runAsNonRoot"] is True
        assert specification["automountServiceAccountToken"] is False
        for container in specification["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_pod_security_standard_restricted_admits_every_pod() -> None:
    """Each control of the standard's list, for the service and for the gate."""
    for specification in every_pod():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & specification.keys()
        assert all(
            set(volume) - {"name"} <= {"emptyDir", "persistentVolumeClaim"} for volume in specification["volumes"]
        )
        assert specification["securityContext"]["runAsUser"] > 0
        for container in specification["containers"]:
            assert container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"]["runAsNonRoot"] is True
            assert all("hostPort" not in port for port in container.get("ports", []))


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
    named = objects["Service", workload["spec"]["serviceName"]]["spec"]
    assert named["clusterIP"] == "None"
    assert named["selector"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()


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


def test_numbers_of_a_file_reach_the_service_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helm reads them as floats: 67108864 must not become 6.7108864e+07, which is no integer to the service."""
    from service.settings import Settings

    for name, value in environment(render("settings")).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.max_body_bytes == 67108864
    assert settings.request_timeout == 12.5
    assert settings.tracing is True
    assert settings.windows == (300.0, 3600.0)
    assert settings.monitor_rate == float("inf")


@pytest.mark.parametrize(
    ("cpu", "threads", "decoding"),
    [("1", "1", "1"), ("500m", "1", "1"), ("2500m", "1", "1"), ("8", "7", "4"), ("3.5", "2", "2")],
)
def test_threads_follow_the_cpus_asked_for(cpu: str, threads: str, decoding: str) -> None:
    """Without a limit of CPU a pod sees all of its node's, and would start as many threads."""
    variables = environment(render("default", "--set", f"resources.requests.cpu={cpu}"))
    assert variables["FULLRANK_THREADS"] == threads
    assert variables["FULLRANK_DECODE_THREADS"] == decoding
    assert environment(render("settings"))["FULLRANK_THREADS"] == "6"
    assert "FULLRANK_THREADS" not in environment(render("default", "--set", "resources.requests.cpu=null"))


def test_every_variable_is_set_once() -> None:
    for values in SETS:
        names = [it["name"] for it in pod(render(values))["containers"][0]["env"]]
        assert len(names) == len(set(names)), values


def test_the_pod_has_time_for_what_it_accepted() -> None:
    """Not ready, drain_seconds of listening, request_timeout and 5 s more for answers, then the windows are saved."""
    for values in SETS:
        objects = render(values)
        variables = environment(objects)
        drain, request = (
            float(variables["FULLRANK_DRAIN_SECONDS"]),
            float(variables.get("FULLRANK_REQUEST_TIMEOUT", 30)),
        )
        assert drain > 0, "proxies learn of a pod's end after the pod does"
        assert pod(objects)["terminationGracePeriodSeconds"] >= drain + request + 10
    assert "need 50" in refused("terminationGracePeriodSeconds=40")


def test_names_fit_the_labels_that_kubernetes_makes_of_them() -> None:
    done = helm("template", "a" * 53, str(CHART), "--set", "persistence.enabled=true,gate.enabled=true,encoder.path=/e")
    assert done.returncode == 0, done.stderr
    names = {it["kind"]: it["metadata"]["name"] for it in yaml.safe_load_all(done.stdout) if it}
    assert len(names["StatefulSet"]) <= 52
    assert len(names["Job"]) <= 63
    assert len(names["Service"]) <= 63


def test_keys_come_from_secrets() -> None:
    objects = render("secured")
    assert environment(objects)["FULLRANK_API_KEY"] == {"secretKeyRef": {"name": "keys", "key": "embed"}}
    assert pod(objects)["containers"][0]["image"].endswith("@sha256:" + 4 * "0123456789abcdef")
    policy = objects["NetworkPolicy", "web-fullrank"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"]
    assert policy["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.0.0.5/32"}}]
    assert "api_key" in refused("settings.api_key=a-key-in-plain-text")
    assert "api_keys" in refused("settings.api_keys=embed=a-key-in-plain-text")


def test_nothing_leaves_the_pods_by_default() -> None:
    objects = render("gated")
    policy = objects["NetworkPolicy", "web-fullrank"]["spec"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    [among] = policy["podSelector"]["matchExpressions"]
    service = objects["Service", "web-fullrank"]["spec"]["selector"]
    for kind, name, serves in (("Deployment", "web-fullrank", True), ("Job", "web-fullrank-gate", False)):
        labels = objects[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
        assert labels[among["key"]] in among["values"]
        assert (service.items() <= labels.items()) == serves


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


def test_pods_are_spread_by_their_own_labels() -> None:
    objects = render("spread")
    [constraint] = pod(objects)["topologySpreadConstraints"]
    [workload] = [it for (kind, _), it in objects.items() if kind == "Deployment"]
    assert constraint["labelSelector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]


def test_a_disruption_budget_lets_a_node_be_drained() -> None:
    """minAvailable: 1 would forbid it for ever where there is one replica."""
    budget = render("autoscaled")["PodDisruptionBudget", "web-fullrank"]["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["replicas=many"], "replicas"),
        (["replica=2"], "replica"),
        (["image.digest=latest"], "digest"),
        (["persistence.size=big"], "size"),
        (["persistence.size=1.2.3Gi"], "/persistence/size': '1.2.3Gi' does not match"),
        (["persistence.enabled=si"], "/persistence/enabled': got string, want boolean"),
        (["podSecurityContext.runAsUser=root"], "/podSecurityContext/runAsUser': got string, want null or integer"),
        (["podSecurityContext.runAsUser=0"], "/podSecurityContext/runAsUser': minimum: got 0, want 1"),
        (["imagePullSecrets[0].nam=registry"], "/imagePullSecrets/0': missing property 'name'"),
        (["extraEnv[0].name=A,extraEnv[0].valeu=b"], "/extraEnv/0': additional properties 'valeu' not allowed"),
        (["extraVolumeMounts[0].name=x"], "/extraVolumeMounts/0': missing property 'mountPath'"),
        (["nodeSelector.gpu=true"], "/nodeSelector/gpu': got boolean, want string"),
        (["networkPolicy.ingress[0].frm=x"], "/networkPolicy/ingress/0': additional properties 'frm' not allowed"),
        (["ingress.hosts[0].host=http://a"], "/ingress/hosts/0/host': 'http://a' does not match"),
        (["service.type=Balancer"], "value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
        (["probes.liveness.periodSeconds=0"], "/probes/liveness/periodSeconds': minimum: got 0, want 1"),
        (["rollingUpdate.maxUnavailable=0", "rollingUpdate.maxSurge=0"], "make one of them 1"),
        (["settings.Max-Batch=3"], "Max-Batch"),
        (["settings.max_bach=3"], "max_bach"),
        (["settings.max_batch=many"], "max_batch"),
        (["settings.max_batch=0"], "max_batch"),
        (["settings.gate=of"], "gate"),
        (["resources.requests.cpu=much"], "cpu"),
        (["podDisruptionBudget.maxUnavailable=some"], "maxUnavailable"),
        (["autoscaling.enabled=true", "autoscaling.minReplicas=9"], "autoscaling.maxReplicas is 4"),
        (["autoscaling.enabled=true", "resources.requests.cpu=null"], "resources.requests.cpu"),
        (["ingress.enabled=true"], "ingress.hosts"),
        (["autoscaling.enabled=true", "keda.enabled=true"], "choose one"),
        (["gate.enabled=true"], "encoder.path"),
        (["keda.prometheus=prometheus:9090"], "prometheus"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(settings: list[str], says: str) -> None:
    assert says in refused(*settings)


def test_the_schema_knows_the_services_settings() -> None:
    assert chart.SCHEMA.read_text() == chart.schema(chart.SCHEMA.read_text()), "run `python -m tools.chart`"


def test_the_page_lists_what_is_rendered() -> None:
    text = chart.PAGE.read_text()
    assert text == chart.page(text, binary("helm")), "run `python -m tools.chart`"
    for values in SETS:
        for kind, name in render(values):
            assert f"| {kind} | `{name}` |" in text


def test_the_kustomize_base_is_the_charts(deploy: Path) -> None:
    base = deploy / "kustomize" / "base"
    written = {path.name: path.read_text() for path in base.iterdir()}
    assert written == kustomize.files(binary("helm"))
    done = subprocess.run([binary("kubectl"), "kustomize", str(base)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds = {it["kind"] for it in yaml.safe_load_all(done.stdout)}
    assert kinds == {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount"}
