"""The Helm chart, rendered by the real Helm: every object is valid, and says what the values ask for."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

from tests.support.chart import CHART, SETS, binary, helm, refused, render
from tools import chart, kustomize

VERSION = "1.29"
CUSTOM = {"PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule, "ScaledObject": ScaledObject}


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


def test_names_fit_the_labels_that_kubernetes_makes_of_them() -> None:
    done = helm("template", "a" * 53, str(CHART), "--set", "persistence.enabled=true,gate.enabled=true,encoder.path=/e")
    assert done.returncode == 0, done.stderr
    names = {it["kind"]: it["metadata"]["name"] for it in yaml.safe_load_all(done.stdout) if it}
    assert len(names["StatefulSet"]) <= 52
    assert len(names["Job"]) <= 63
    assert len(names["Service"]) <= 63


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
