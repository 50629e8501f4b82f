"""docker-compose.yml: what it promises, read from the file, and by docker-compose itself where there is one."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.demo import COLLAPSED

ALWAYS = {"embed", "prometheus", "alertmanager", "grafana"}
PROFILES = {"embed-gpu": ["gpu"]}


@pytest.fixture(scope="module")
def compose(deploy: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((deploy.parent / "docker-compose.yml").read_text())
    return content


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def demo(deploy: Path) -> dict[str, dict[str, Any]]:
    """The services of the demonstration, which lies over docker-compose.yml."""
    found: dict[str, dict[str, Any]] = yaml.safe_load((deploy / "compose" / "demo.yml").read_text())["services"]
    return found


def test_up_needs_nothing_else(services: dict[str, dict[str, Any]]) -> None:
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == PROFILES
    assert set(services) == ALWAYS | set(PROFILES)
    text = yaml.safe_dump(services)
    assert re.findall(r"(?<!\$)\$\{(\w+)(?::\?|\?|\})", text) == []  # every variable has a default


def test_images_are_pinned(services: dict[str, dict[str, Any]], demo: dict[str, dict[str, Any]]) -> None:
    for service in (*services.values(), demo["demo"]):
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-cuda)?", service["image"])


def test_every_service_is_confined(services: dict[str, dict[str, Any]], demo: dict[str, dict[str, Any]]) -> None:
    for name, service in {**services, "demo": demo["demo"]}.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"].partition(":")[0] not in ("0", "root")
        assert service["mem_limit"]
        assert service["pids_limit"]
        assert "privileged" not in service


def test_nothing_listens_beyond_loopback(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == len(ALWAYS) + 1
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_there_is_no_password_to_guess(services: dict[str, dict[str, Any]]) -> None:
    grafana = services["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for service in services.values() for name in service.get("environment", {}) if "PASSWORD" in name]


def test_every_service_says_whether_it_is_well(services: dict[str, dict[str, Any]], deploy: Path) -> None:
    assert "HEALTHCHECK" in (deploy.parent / "Dockerfile").read_text()  # embed's and embed-gpu's
    assert all("test" in services[name]["healthcheck"] for name in ALWAYS - {"embed"})


def test_state_is_in_named_volumes_and_configuration_is_read_only(
    compose: dict[str, Any], services: dict[str, dict[str, Any]], deploy: Path
) -> None:
    mounts = [mount.split(":") for service in services.values() for mount in service.get("volumes", [])]
    for source, _, *mode in mounts:
        if source.startswith("./"):
            assert mode == ["ro"]
            assert (deploy.parent / source).is_dir()
        else:
            assert source in compose["volumes"]
    assert {source for source, *_ in mounts if not source.startswith("./")} == set(compose["volumes"])
    state = services["embed"]["environment"]["FULLRANK_STATE_DIR"]
    assert f"embed:{state}" in services["embed"]["volumes"]
    assert f"install -d -o fullrank -g fullrank {state}" in (deploy.parent / "Dockerfile").read_text()


def test_prometheus_knows_the_services_by_name(services: dict[str, dict[str, Any]], deploy: Path) -> None:
    (job,) = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    named = [t for c in job["static_configs"] for t in c["targets"]] + [
        n for c in job["dns_sd_configs"] for n in c["names"]
    ]
    assert {target.partition(":")[0] for target in named} == {"embed", "embed-gpu"} <= set(services)
    grafana = {mount.split(":")[1] for mount in services["grafana"]["volumes"]}
    provider = yaml.safe_load((deploy / "grafana" / "provisioning" / "dashboards" / "fullrank.yml").read_text())
    assert provider["providers"][0]["options"]["path"] in grafana
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) in grafana
    assert (deploy / "grafana" / "dashboards" / home.name).exists()


def test_only_the_demonstration_has_the_collapsed_encoder(deploy: Path, demo: dict[str, dict[str, Any]]) -> None:
    ignored = (deploy.parent / ".dockerignore").read_text().splitlines()
    assert {"!tools", "!training", "!models", "!requirements"} <= set(ignored)
    assert COLLAPSED.parent.relative_to(deploy.parent).as_posix() in ignored[ignored.index("!tools") :]
    ((source, target, mode),) = (mount.split(":") for mount in demo["embed"]["volumes"])
    assert (deploy.parent / source).resolve() == COLLAPSED
    assert (target, mode) == (f"/app/models/pretrained/{COLLAPSED.name}", "ro")
    assert set(demo) == {"embed", "demo"}
    assert demo["demo"]["network_mode"] == "service:embed"
    assert "ports" not in demo["demo"]


def test_docker_compose_accepts_it(deploy: Path) -> None:
    command = ["docker-compose"]
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        command = ["docker", "compose"]
    elif not shutil.which("docker-compose"):
        pytest.skip("there is no docker compose")
    files = ["-f", "docker-compose.yml", "-f", "deploy/compose/demo.yml"]
    for profiles in ([], files, ["--profile", "gpu"]):
        done = subprocess.run(
            [*command, *profiles, "config", "-q"], cwd=deploy.parent, env=os.environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
