"""The pods of the Helm chart: confined, probed, with the settings, keys and time that they need."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chart import SETS, environment, pod, refused, render


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


def test_pods_are_spread_by_their_own_labels() -> None:
    objects = render("spread")
    [constraint] = pod(objects)["topologySpreadConstraints"]
    [workload] = [it for (kind, _), it in objects.items() if kind == "Deployment"]
    assert constraint["labelSelector"]["matchLabels"] == workload["spec"]["selector"]["matchLabels"]
    own = '{"maxSkew": 1, "labelSelector": {"matchLabels": {"tier": "ml"}}}'
    [constraint] = pod(render("spread", "--set-json", f"topologySpreadConstraints=[{own}]"))[
        "topologySpreadConstraints"
    ]
    assert constraint["labelSelector"] == {"matchLabels": {"tier": "ml"}}
