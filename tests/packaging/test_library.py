"""The library's wheel alone, in an environment with torch, numpy and safetensors: what a stranger installs."""

import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.support.distributions import LIBRARY, ROOT

WEB = ("fastapi", "starlette", "uvicorn", "pydantic", "httpx", "prometheus_client")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(python: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python without anything of this repository: -I ignores the folder it starts in and PYTHONPATH."""
    command = [python, "-I", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=one_thread, capture_output=True, text=True, timeout=600, check=False)


def test_the_wheel_holds_the_library_alone(library: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(library[1]) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fullrank"}
    shipped = {name for name in names if name.startswith("fullrank/")}
    sources = {f"fullrank/{it.relative_to(ROOT / 'fullrank')}" for it in (ROOT / "fullrank").rglob("*.py")}
    assert shipped == {it for it in sources if "/build/" not in it} | {"fullrank/py.typed"}
    assert [it.split(">")[0] for it in LIBRARY["project"]["dependencies"]] == ["numpy", "safetensors", "torch"]


def three_lines(page: Path) -> str:
    """The first Python block of a page."""
    found = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert found, page
    return found[1]


def test_the_three_lines_print_a_number_and_end_well(bare: Path, tmp_path: Path) -> None:
    lines = three_lines(ROOT / "README.md")
    assert three_lines(ROOT / "fullrank" / "README.md") == lines
    rows = "import torch\nembeddings = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))\n"
    done = run(bare, "-c", rows + lines, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"effective rank\D+([\d.]+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) == pytest.approx(256, rel=0.05)  # as many as isotropic rows have dimensions


@pytest.mark.parametrize("module", ["fullrank", "fullrank.monitor", "fullrank.reference", "fullrank.verdict"])
def test_importing_it_loads_no_web_framework(bare: Path, module: str, tmp_path: Path) -> None:
    program = f"import sys, {module}; print(sorted(set({WEB}) & sys.modules.keys()))"
    done = run(bare, "-c", program, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_client_loads_no_torch(with_extras: Path, tmp_path: Path) -> None:
    program = "import sys, fullrank.client, fullrank; print('torch' in sys.modules, fullrank.__version__)"
    done = run(with_extras, "-c", program, folder=tmp_path)
    version = re.search(r'__version__ = "(.+)"', (ROOT / "fullrank" / "__init__.py").read_text())
    assert version
    assert (done.returncode, done.stdout) == (0, f"False {version[1]}\n"), done.stderr


@pytest.mark.parametrize(("module", "extra"), [("client", "client"), ("exposition", "prometheus")])
def test_a_missing_extra_is_named_with_the_command_that_adds_it(
    bare: Path, module: str, extra: str, tmp_path: Path
) -> None:
    done = run(bare, "-c", f"import fullrank.{module}", folder=tmp_path)
    assert done.returncode == 1
    assert f"pip install 'fullrank[{extra}]'" in done.stderr.splitlines()[-1]


@pytest.mark.soak
def test_the_library_installs_into_an_empty_environment_from_the_index(
    library: tuple[Path, Path], tmp_path: Path
) -> None:
    """Everything for real: pip, the index, torch. Needs the network, and minutes."""
    import venv

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", f"{library[1]}[prometheus]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for example in EXAMPLES:
        if example.stem not in ("other_server", "efficientnet"):  # these need packages of their own
            assert run(python, example, folder=tmp_path).returncode == 0
