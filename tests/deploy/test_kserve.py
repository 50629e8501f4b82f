"""The KServe example: its pod is valid and confined, and what its comment says to send is answered."""

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import numpy as np
import pytest
import yaml
from PIL import Image

from models.artifact import load
from models.embedder import Embedder, normalize
from service.settings import DEFAULT, Settings
from tests.support.process import running

FILE = Path(__file__).parents[2] / "deploy" / "kserve" / "inferenceservice.yaml"
OF_KSERVE = {"minReplicas", "maxReplicas"}


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found


@pytest.fixture(scope="module")
def predictor(service: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = service["spec"]["predictor"]
    return found


def test_its_pod_is_valid_and_confined(predictor: dict[str, Any]) -> None:
    specification = {key: it for key, it in predictor.items() if key not in OF_KSERVE}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "it"}, "spec": specification}
    kubernetes_validate.validate(pod, "1.29", strict=True)
    [container] = predictor["containers"]
    assert container["name"] == "kserve-container", "KServe takes the container of this name for the predictor"
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {it["mountPath"] for it in container["volumeMounts"]} == {"/state", "/tmp"}
    assert {it["name"] for it in container["volumeMounts"]} == {it["name"] for it in predictor["volumes"]}
    assert container["livenessProbe"]["httpGet"]["path"] != container["readinessProbe"]["httpGet"]["path"]


def test_its_variables_are_the_services(predictor: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for it in predictor["containers"][0]["env"]:
        monkeypatch.setenv(it["name"], it["value"])
    settings = Settings()
    assert settings.drain_seconds + settings.request_timeout + 10 <= predictor["terminationGracePeriodSeconds"]


def test_what_it_says_to_send_is_answered(service: dict[str, Any], predictor: dict[str, Any], tmp_path: Path) -> None:
    """The command of the comment, by a real shell and curl, and the probes and the scrape, against a real uvicorn."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    command = re.sub(r"^# ?", "", FILE.read_text().partition("apiVersion")[0], flags=re.MULTILINE)
    command = command[command.index("curl") :].replace("curl", "curl -sS --max-time 300", 1)
    with running(Settings(threads=1, decode_threads=1)) as (url, _):
        asked = command.replace("http://fullrank.default.example.org", url)
        assert asked != command
        done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answer = yaml.safe_load(done.stdout)
        paths = [
            predictor["containers"][0][f"{it}Probe"]["httpGet"]["path"] for it in ("startup", "readiness", "liveness")
        ]
        paths.append(service["metadata"]["annotations"]["prometheus.kserve.io/path"])
        for path in paths:
            status = subprocess.run(["curl", "-sS", "--fail", url + path], capture_output=True, text=True)
            assert status.returncode == 0, status.stderr
    [output] = answer["outputs"]
    embedder = Embedder(load(DEFAULT))
    [expected] = normalize(embedder.embed_files([tmp_path / "image.png"])).numpy()
    np.testing.assert_allclose(np.array(output["data"]).reshape(output["shape"])[0], expected, atol=1e-5)
