"""onnxruntime tells nobody what it runs, and writes nothing into the home folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
OURS = """
from pathlib import Path
from models.artifact import load
from models.embedder import Embedder
print(Embedder(load(Path("models/pretrained/fashion-byol")), engine="onnx", threads=1).engine.name)
"""


def ran(code: str, home: Path) -> str:
    """What the code prints in a process whose home is empty; not as in a CI, where onnxruntime is quiet by itself."""
    silent = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in silent}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "telemetry" not in done.stderr
    return done.stdout


def test_our_engine_leaves_no_device_id_and_no_queue_of_events(tmp_path: Path) -> None:
    assert ran(OURS, tmp_path) == "onnx\n"
    assert [it for it in tmp_path.rglob("*") if "onnxruntime" in str(it).lower()] == []


def test_the_variable_is_set_before_onnxruntime_is_loaded(tmp_path: Path) -> None:
    loaded = (
        "import os, sys, models.exporting; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    )
    assert ran(loaded, tmp_path) == "1 True\n"


def test_nothing_of_ours_imports_onnxruntime_another_way() -> None:
    importing = [
        it.relative_to(ROOT).as_posix()
        for room in ("cli", "models", "scale", "service", "tools", "training")
        for it in (ROOT / room).rglob("*.py")
        if "import onnxruntime" in it.read_text() and "models.engines.runtime" not in it.read_text()
    ]
    assert importing == ["models/engines/runtime.py"]
