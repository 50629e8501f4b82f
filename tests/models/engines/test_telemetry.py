"""onnxruntime's usage data: none is collected by what serves an encoder here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITTEN = """
import sys
from pathlib import Path
from models.artifact import load
from models.embedder import Embedder
print(Embedder(load(Path(sys.argv[1])), "cpu", engine="onnx").engine.name)
"""


@pytest.mark.parametrize(("asked", "kept"), [({}, False), ({"ORT_DISABLE_TELEMETRY": "0"}, True)])
def test_no_identifier_of_the_user_is_kept(
    small_artifact: Path, tmp_path: Path, asked: dict[str, str], kept: bool
) -> None:
    environment = {name: it for name, it in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")} | asked
    command = [sys.executable, "-c", WRITTEN, str(small_artifact)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = "onnxruntime.db" in {it.name for it in tmp_path.rglob("*")}
    if kept and not found:
        pytest.skip("this build of onnxruntime collects nothing at all")
    assert found == kept
