"""fullrank export: every form of an encoder, and of a run's checkpoint."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner, Result

from cli import app
from models.artifact import load
from models.embedder import Embedder
from tests.support.images import photo
from training.checkpoint import save
from training.methods import build
from training.recipes import recipe


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200"})


def test_every_form_at_once(small_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(small_artifact, "--onnx", "--torch-export", "--safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    names = {"encoder.json", "encoder.onnx", "encoder.pt2", "encoder.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(line).name for line in result.output.split()} == names
    assert load(out).card.revision == load(small_artifact).card.revision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the loop writes it, of a run that has just begun."""
    torch.manual_seed(0)
    chosen = recipe("fashion-simclr")
    method = build(chosen.method, chosen.architecture.build(), chosen.options)
    from training.checkpoint import describe

    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    state = {"recipe": json.dumps(describe(chosen)), "method": method.state_dict(), "step": 7, "precision": "float16"}
    save(state, path)
    return path


def test_a_checkpoint_becomes_an_artifact_and_a_graph(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, "--safetensors", "--onnx", "--out", out).exit_code == 0
    artifact = load(out)
    progress = {key: artifact.card.training[key] for key in ("checkpoint_step", "precision")}
    assert progress == {"checkpoint_step": 7, "precision": "float16"}
    state = torch.load(checkpoint, weights_only=True)["method"]
    for name, tensor in artifact.encoder.state_dict().items():
        assert torch.equal(tensor, state[f"encoder.{name}"])
    images = np.stack([np.asarray(photo((28, 28), seed).convert("L"))[None] for seed in range(3)])
    (rows,) = onnxruntime.InferenceSession(str(out / "encoder.onnx")).run(None, {"pixels": images})
    np.testing.assert_allclose(rows, Embedder(artifact, engine="torch").embed(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{encoder}"], 2, "choose what to write: --onnx, --torch-export, --safetensors"),
        (["{encoder}", "--safetensors"], 2, "--out: name the folder"),
        (["{damaged}", "--onnx"], 2, "--out: name the folder"),
        (
            ["{damaged}", "--onnx", "--out", "{new}"],
            1,
            "is damaged, or no checkpoint of this version (torch.save did not",
        ),
        (["{nowhere}", "--onnx"], 1, "is not a folder"),
        (["{encoder}", "--onnx", "--out", "{damaged}"], 2, "damaged.pt"),
    ],
)
def test_what_cannot_be_exported_is_explained(
    small_artifact: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"PK not really")
    places = {"encoder": small_artifact, "damaged": damaged, "new": tmp_path / "new", "nowhere": tmp_path / "nowhere"}
    result = run(*(it.format(**places) for it in arguments))
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()
