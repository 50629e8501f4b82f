"""The dashboards and alerts in a real Grafana: python -m tests.compose.grafana

Starts docker-compose.yml's Grafana, read-only as it is shipped, with Prometheus and the service, and asks its API
whether everything was provisioned and each alert rule evaluates. Needs Docker and Grafana's image; without them it says
so and ends with exit code 2. Takes two minutes, and removes what it started.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.compose.engine import ROOT, Steps, compose, stack
from tools.stack import StackError, call

GRAFANA = "http://127.0.0.1:3000"
FILES = ROOT / "deploy" / "grafana"


class UnavailableError(RuntimeError):
    """Docker or the image is not to be had; the message says which."""


def image() -> str:
    """Grafana's image, pulled if need be. Raises UnavailableError."""
    name: str = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]["image"]
    try:
        if subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0:
            return name
        pulled = subprocess.run(["docker", "pull", name], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnavailableError("there is no docker on the PATH") from error
    if pulled.returncode:
        raise UnavailableError(f"{name} cannot be pulled: {pulled.stderr.strip().splitlines()[-1]}")
    return name


def ask(path: str) -> Any:
    return json.loads(call(f"{GRAFANA}/api/{path}"))


def shipped_rules() -> set[str]:
    groups = yaml.safe_load((FILES / "provisioning" / "alerting" / "rules.yml").read_text())["groups"]
    return {rule["title"] for group in groups for rule in group["rules"]}


def loaded_rules() -> dict[str, dict[str, Any]]:
    groups = ask("prometheus/grafana/api/v1/rules")["data"]["groups"]
    return {rule["name"]: rule for group in groups for rule in group["rules"]}


def errors() -> list[str]:
    """Lines of Grafana's log that complain about what we provision."""
    log = compose("logs", "--no-color", "grafana").splitlines()
    return [line for line in log if "level=error" in line and "provision" in line]


def check() -> None:
    """Raises StackError at the first thing that is not as it should be."""
    steps = Steps()
    steps.reached("Grafana is healthy", lambda: ask("health")["database"] == "ok", 120)
    for file in sorted((FILES / "dashboards").glob("*.json")):
        board = json.loads(file.read_text())
        seen = ask(f"dashboards/uid/{board['uid']}")
        titles = [[panel["title"] for panel in version["panels"]] for version in (board, seen["dashboard"])]
        if titles[0] != titles[1] or not seen["meta"]["provisioned"]:
            raise StackError(f"{file.name} is not what Grafana has under {board['uid']}")
        schema = seen["dashboard"]["schemaVersion"]
        print(f"          dashboard {board['title']}: {len(titles[0])} panels, schema {schema}")
    (contact,) = [point for point in ask("v1/provisioning/contact-points") if point["uid"] == "fullrank-webhook"]
    if ask("v1/provisioning/policies")["receiver"] != contact["name"]:
        raise StackError("the notification policy does not name our contact point")
    steps.reached("every alert rule is there", lambda: set(loaded_rules()) == shipped_rules(), 30)
    evaluated = {"ok", "nodata"}
    steps.reached(
        "every alert rule was evaluated without an error",
        lambda: all(
            rule["health"] in evaluated and not rule["lastEvaluation"].startswith("0001")
            for rule in loaded_rules().values()
        ),
        120,
    )
    for name, rule in sorted(loaded_rules().items()):
        print(f"          {name}: {rule['state']}, {rule['health']}")
    if errors():
        raise StackError("Grafana complains:\n" + "\n".join(errors()))


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    try:
        print(f"with {image()}")
        with tempfile.TemporaryDirectory() as folder:
            # The provisioning API answers administrators only; here, and never in what is shipped, everybody is one.
            override = Path(folder) / "administrator.json"
            admin = {"services": {"grafana": {"environment": {"GF_AUTH_ANONYMOUS_ORG_ROLE": "Admin"}}}}
            override.write_text(json.dumps(admin))
            with stack(["embed", "prometheus", "grafana"], files=[override]):
                check()
    except UnavailableError as error:
        print(f"make grafana-test needs a Docker engine and Grafana's image: {error}", file=sys.stderr)
        return 2
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    print("everything that is provisioned is there, and evaluates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
