"""Both distributions, built once, and environments that hold the library and nothing else of this repository."""

from pathlib import Path

import pytest

from tests.support.distributions import ROOT, build, environment, install


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The library's sdist and wheel."""
    return build(ROOT / "fullrank", tmp_path_factory.mktemp("library") / "dist")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The application's sdist and wheel."""
    return build(ROOT, tmp_path_factory.mktemp("server") / "dist")


@pytest.fixture(scope="session")
def bare(library: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its three dependencies, and numpy and torch's own."""
    found = environment(tmp_path_factory.mktemp("bare") / "venv", "torch", "numpy", "safetensors")
    install(found, library[1])
    return found


@pytest.fixture(scope="session")
def with_extras(library: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with what the extras add."""
    names = ("torch", "numpy", "safetensors", "prometheus-client", "httpx")
    found = environment(tmp_path_factory.mktemp("extras") / "venv", *names)
    install(found, library[1])
    return found
