"""The Helm chart, rendered by the real Helm."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

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
