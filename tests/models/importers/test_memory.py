"""An import takes memory for the weights that it keeps, not for the rest of the file."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from models.backbones import ResNet
from models.importers.strip import _start

MEBI = 1 << 20
CHILD = """
import json, sys
from pathlib import Path
from models.importers import Options, import_encoder
from models.artifact import save
import models.embedder, torch

def peak():
    # of this program alone; ru_maxrss may begin at the peak of the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
import_encoder(Path(sys.argv[2]), Options(strip=True))  # a small one first, so that everything is loaded
before = peak()
artifact, report = import_encoder(Path(sys.argv[1]), Options(strip=sys.argv[3] == "strip"))
save(artifact, sys.argv[4])
print(json.dumps({"took": peak() - before, "left_out": report.left_out, "kept": report.kept}))
"""


def written(path: Path, width: int, other: int, objects: bool) -> dict[str, torch.Tensor]:
    """A training checkpoint with `other` bytes of an optimiser's state, which take no room on the disk (a sparse file).

    Returns the encoder's weights.
    """
    torch.manual_seed(0)
    state = ResNet("resnet18", width=width).state_dict()
    content = {
        "optimizer": {"state": {i: {"exp_avg": torch.empty(other // 16)} for i in range(4)}},
        "state_dict": {"module.backbone." + name: tensor for name, tensor in state.items()},
    }
    with torch.serialization.skip_data():
        torch.save(content | ({"config": SimpleNamespace(lr=0.1)} if objects else {}), path)
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        # The optimiser's four storages come first.
        for number, tensor in enumerate(state.values()):
            name = f"{path.stem}/data/{number + 4}"
            file.seek(_start(archive, archive.getinfo(name)))
            file.write(tensor.numpy().tobytes())
    return state


def measured(tmp_path: Path, width: int, other: int, strip: bool) -> int:
    """The bytes that importing took at most. The result is checked against the weights."""
    big, small, out = tmp_path / "big.ckpt", tmp_path / "small.ckpt", tmp_path / "encoder"
    state = written(big, width, other, objects=strip)
    assert big.stat().st_size > other > big.stat().st_blocks * 512
    torch.save({"module.backbone." + k: v for k, v in ResNet("resnet18", width=4).state_dict().items()}, small)
    command = [sys.executable, "-c", CHILD, str(big), str(small), "strip" if strip else "", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["left_out"] == (["types.SimpleNamespace"] if strip else [])
    for name, tensor in load_file(out / "encoder.safetensors").items():
        assert torch.equal(tensor, state[name])
    print(f"{big.stat().st_size >> 20} MiB, strip {strip}: took {int(said['took']) / MEBI:.0f} MiB")
    return int(said["took"])


@pytest.mark.parametrize("strip", [True, False])
def test_what_is_not_kept_takes_no_memory(strip: bool, tmp_path: Path) -> None:
    kept = sum(tensor.nbytes for tensor in ResNet("resnet18", width=8).state_dict().values())
    assert kept < MEBI
    assert measured(tmp_path, 8, 400 * MEBI, strip) < 100 * MEBI


@pytest.mark.soak
@pytest.mark.parametrize("strip", [True, False])
def test_a_file_of_gigabytes_takes_the_memory_of_its_encoder(strip: bool, tmp_path: Path) -> None:
    kept = sum(tensor.nbytes for tensor in ResNet("resnet18", width=64).state_dict().values())
    assert measured(tmp_path, 64, 3 << 30, strip) < 3 * kept + 100 * MEBI


def test_a_packed_archive_and_an_old_file_give_the_same_tensors(tmp_path: Path) -> None:
    """Compressed members, which cannot be mapped; the format before PyTorch 1.6, whose storages are not aligned."""
    from models.importers.checkpoint import read

    content = {"a": torch.arange(7.0), "b": torch.arange(12, dtype=torch.int16).view(3, 4).t(), "c": torch.ones(0)}
    content |= {"half": torch.arange(5).half(), "shared": content["a"][2:5]}
    plain, packed, old = tmp_path / "plain.pth", tmp_path / "packed.pth", tmp_path / "old.pth"
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    torch.save(content, old, _use_new_zipfile_serialization=False)
    for path in (plain, packed, old):
        for strip in (False, True):
            found = read(path, strip).tensors()
            assert found.keys() == content.keys()
            for name, tensor in content.items():
                assert torch.equal(found[name], tensor), (path.name, strip, name)
