"""Writes deploy/kustomize/base from the Helm chart's defaults: python -m tools.kustomize"""

import subprocess
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
CHART, BASE = DEPLOY / "helm" / "fullrank", DEPLOY / "kustomize" / "base"
HEADER = "# Written by python -m tools.kustomize from deploy/helm/fullrank: change that.\n"
# Objects that a plain cluster does not know are in an overlay: the operator's objects need their definitions installed.
OPTIONS = ("--set", "podDisruptionBudget.enabled=true")
HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")


def files(helm: str = "helm") -> dict[str, str]:
    """File name -> content, of the base."""
    command = [helm, "template", "fullrank", str(CHART), *OPTIONS]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    objects = [it for it in yaml.safe_load_all(rendered) if it]
    found = {}
    for it in objects:
        for label in HELMS_OWN:
            it["metadata"]["labels"].pop(label, None)
        found[f"{it['kind'].lower()}.yaml"] = HEADER + yaml.safe_dump(it, sort_keys=False)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(found),
    }
    return found | {"kustomization.yaml": HEADER + yaml.safe_dump(kustomization, sort_keys=False)}


def main() -> None:
    """Write the files."""
    BASE.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (BASE / name).write_text(content)


if __name__ == "__main__":
    main()
