"""deploy/ is no installed package: the tests import it, and read its files, from the repository."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PACKAGES = {"promtool": "prometheus", "prometheus": "prometheus"}


def about_embeddings(deploy: Path) -> set[str]:
    """The alerts on what an encoder makes of its traffic, none of which a slow machine sets off."""
    groups = yaml.safe_load((deploy / "prometheus" / "rules" / "embeddings.yml").read_text())["groups"]
    names = {rule["alert"] for group in groups if group["name"] != "embedding-monitor" for rule in group["rules"]}
    assert {"EmbeddingModelFault", "EmbeddingRankCollapse", "EmbeddingTrafficShifted"} <= names
    return names


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """tool("promtool") is its path; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not on the PATH (Debian package {PACKAGES.get(name, 'prometheus-alertmanager')})")
        return path

    return find


@pytest.fixture(scope="session")
def deploy() -> Path:
    """The folder deploy/."""
    return ROOT / "deploy"
