"""Two processes under torchrun, on the CPU over gloo: one run, one artifact, the gradients of the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.artifact import load

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, io
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from rich.console import Console
from models.artifact import Architecture
from training.data import SAMPLE
from training.loop import Run, train
from training.recipes import recipe
tiny = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2")
small = replace(recipe("fashion-simclr"), architecture=tiny, options={{"hidden": 16}}, epochs=1, batch_size=128)
train(small, Run(Path(sys.argv[1]), data=SAMPLE), Console(file=io.StringIO()))
"""


def run(command: list[str], script: Path, out: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(out)], env=environment, check=True, timeout=400, capture_output=True)


def test_two_processes_make_one_artifact(tmp_path: Path) -> None:
    """Negatives and BatchNorm are joint, so only the augmentations' draws tell the two runs' losses apart."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(torchrun, script, tmp_path / "two")
    run([sys.executable], script, tmp_path / "one")
    records = {name: json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two")}
    assert records["two"]["loss"] == pytest.approx(records["one"]["loss"], rel=0.02)
    artifact = load(tmp_path / "two" / "encoder")
    assert artifact.reference is not None
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["checkpoint.pt", "encoder", "log.jsonl"]
