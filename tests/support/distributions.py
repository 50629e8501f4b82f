"""The two distributions, built from the working tree, and environments that hold nothing but what they are given."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LIBRARY, SERVER = (tomllib.loads((ROOT / part / "pyproject.toml").read_text()) for part in ("fullrank", "."))


def build(project: Path, folder: Path) -> tuple[Path, Path]:
    """The sdist of a project and the wheel made from it, in a new folder, without the network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def closure(*names: str) -> set[str]:
    """What distributions installed here need at run time, themselves included. Names may have extras."""
    found: set[tuple[str, str]] = set()
    left = [Requirement(it) for it in names]
    while left:
        wanted = left.pop()
        name = wanted.name.lower().replace("_", "-")
        for extra in {"", *wanted.extras} - {known for it, known in found if it == name}:
            found.add((name, extra))
            needs = (Requirement(it) for it in distribution(name).requires or ())
            left += [it for it in needs if it.marker is None or it.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def environment(folder: Path, *names: str) -> Path:
    """The Python of a new environment that holds, of all that is installed here, only some distributions.

    They are linked, not installed: copying torch would take a minute and four gigabytes.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in closure(*names):
        there = distribution(name)
        tops = {file.parts[0] for file in there.files or () if file.parts[0] not in ("..", "__pycache__", ".")}
        for top in tops:
            source, target = Path(str(there.locate_file(top))), site / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return python


def clean() -> dict[str, str]:
    """The environment's variables without PYTHONPATH, which would put this repository before an installed wheel."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def install(python: Path, *wheels: Path) -> None:
    """Wheels alone, without what they need."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, *map(str, wheels)], env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def requirements(project: dict[str, Any], extra: str | None = None) -> list[Requirement]:
    """What a pyproject.toml asks for."""
    table = project["project"]
    return [Requirement(it) for it in (table["optional-dependencies"][extra] if extra else table["dependencies"])]


def needed() -> list[str]:
    """What both distributions ask for beside themselves, with extras."""
    both = (*requirements(SERVER), *requirements(LIBRARY))
    return [f"{it.name}[{','.join(it.extras)}]" for it in both if it.name != "fullrank"]
