"""The application's wheel: what it holds, what it depends on, and the command it brings."""

import ast
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.distributions import LIBRARY, ROOT, SERVER, clean, environment, install, needed, requirements

ROOMS = ("cli", "models", "scale", "service", "theory", "tools", "training")


@pytest.fixture(scope="module")
def names(server: tuple[Path, Path]) -> set[str]:
    with zipfile.ZipFile(server[1]) as wheel:
        return set(wheel.namelist())


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "fullrank" / "__init__.py").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_both_have_one_version(library: tuple[Path, Path], server: tuple[Path, Path]) -> None:
    assert SERVER["project"]["version"] == version()
    (depends,) = [it for it in requirements(SERVER) if it.name == "fullrank"]
    assert (str(depends.specifier), depends.extras) == (f"=={version()}", {"client", "prometheus"})
    assert {path.name.split("-")[1] for path in (library[1], server[1])} == {version()}
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version()  # type: ignore[index]
    chart = (ROOT / "deploy" / "helm" / "fullrank" / "Chart.yaml").read_text()
    assert set(re.findall(r'^(?:appVersion|version): "?([\d.]+)"?$', chart, re.MULTILINE)) == {version()}
    images = ("docker-compose.yml", "deploy/compose/demo.yml", "deploy/kustomize/base/deployment.yaml")
    for file in (*images, "deploy/kserve/inferenceservice.yaml", "tests/compose/engine.py"):
        assert set(re.findall(r"\bfullrank:([\d.]+)", (ROOT / file).read_text())) == {version()}, file
    (newest, *_) = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == version()


def test_every_room_is_whole(names: set[str]) -> None:
    for room in ROOMS:
        files = {str(it.relative_to(ROOT)) for it in (ROOT / room).rglob("*.py")}
        assert files
        assert files <= names, room
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {*ROOMS, "deploy"}


def test_what_an_operator_needs_is_inside(names: set[str]) -> None:
    wanted = [*(ROOT / "deploy" / "prometheus" / "rules").iterdir(), *(ROOT / "deploy" / "grafana").rglob("*.*")]
    folders = ("service/http/page", "training/data/fashion-sample", "models/pretrained")
    inside = [it for folder in folders for it in (ROOT / folder).rglob("*") if it.is_file()]
    wanted += [it for it in inside if "__pycache__" not in it.parts]
    assert {str(it.relative_to(ROOT)) for it in wanted} <= names


def test_neither_tests_nor_the_collapsed_encoder_are(names: set[str], server: tuple[Path, Path]) -> None:
    assert not [name for name in names if "collapsed" in name or name.startswith(("tests/", "benchmarks/"))]
    assert server[0].stat().st_size < 60e6  # what the registry takes at most is 100 MB


def test_the_command_works_from_the_wheels_alone(
    library: tuple[Path, Path], server: tuple[Path, Path], tmp_path: Path
) -> None:
    python = environment(tmp_path / "venv", *needed(), "httpx")
    install(python, library[1], server[1])
    (tmp_path / "models").mkdir()  # a user's own folder of that name is in nobody's way
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the wrong models')")
    command = python.with_name("fullrank")

    def run(*arguments: str) -> str:
        words = [command, *arguments]
        done = subprocess.run(words, cwd=tmp_path, env=clean(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"fullrank {version()}\n"
    assert "fashion-directclr" in run("train", "--list")
    assert "rules/embeddings.yml" in run("rules", "monitoring")
    assert (tmp_path / "monitoring" / "grafana" / "dashboards" / "fleet.json").is_file()
    picture = str(ROOT / "examples" / "ankle-boot.png")
    pretrained = next((tmp_path / "venv").glob("lib/*/site-packages/models/pretrained/fashion-directclr"))
    assert '"embedding": [' in run("embed", picture, "--encoder", str(pretrained))


@pytest.mark.soak
def test_the_wheels_are_used_as_by_a_first_user(
    library: tuple[Path, Path], server: tuple[Path, Path], tmp_path: Path
) -> None:
    """On the Python that runs this; the release does it on every one that the wheels name."""
    report = [it.name for it in requirements(SERVER, "report")]
    python = environment(tmp_path / "venv", *needed(), *report, "httpx")
    install(python, library[1], server[1])
    command = [python, "-I", Path(__file__).parents[1] / "support" / "first_user.py", python.with_name("fullrank")]
    command.append(ROOT / "examples" / "ankle-boot.png")
    done = subprocess.run(command, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "POST /embed: a row of 256 by fashion-directclr" in done.stdout


def advice() -> list[tuple[Path, str, str, str]]:
    """Where the code tells a user to install an extra: file, distribution, extra, what is missing."""
    found = []
    for file in sorted(it for room in (*ROOMS, "fullrank") for it in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Try):
                continue
            handlers = "".join(ast.unparse(it) for it in node.handlers)
            told = re.search(r"pip install '([\w-]+)\[(\w+)\]'", handlers.replace("\\'", "'"))
            missing = next((it for it in node.body if isinstance(it, ast.ImportFrom | ast.Import)), None)
            if told and missing:
                module = (missing.module or "") if isinstance(missing, ast.ImportFrom) else missing.names[0].name
                found.append((file, told[1], told[2], module.partition(".")[0]))
    return found


PROVIDES = {"torch": "tensorboard", "prometheus_client": "prometheus-client"}


@pytest.mark.parametrize(("file", "which", "extra", "module"), advice(), ids=lambda it: getattr(it, "stem", it))
def test_advice_names_an_extra_that_holds_what_is_missing(file: Path, which: str, extra: str, module: str) -> None:
    project = {"fullrank": LIBRARY, "fullrank-server": SERVER}[which]
    needs = {it.name for it in requirements(project, extra)}
    assert any(need.startswith(PROVIDES.get(module, module)) for need in needs), needs
