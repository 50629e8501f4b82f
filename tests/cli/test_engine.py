"""--engine and FULLRANK_ENGINE choose what runs the encoder; both give the same embedding."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cli import app
from models.engines import onnx_engine, torch_engine


def embedding(small_artifact: Path, *options: str, **environment: str) -> np.ndarray:
    image = Path(__file__).parents[2] / "examples/ankle-boot.png"
    command = ["embed", str(image), "--encoder", str(small_artifact), *options]
    result = CliRunner().invoke(app, command, env=environment)
    assert result.exit_code == 0, result.output
    return np.array(json.loads(result.output)["embedding"])


def test_the_flag_and_the_variable_choose_the_engine(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for kind in (onnx_engine.OnnxEngine, torch_engine.TorchEngine):
        honest = kind.__call__
        watched = lambda self, pixels, honest=honest: ran.append(self.name) or honest(self, pixels)  # noqa: E731
        monkeypatch.setattr(kind, "__call__", watched)
    rows = [
        embedding(small_artifact),
        embedding(small_artifact, "--engine", "torch"),
        embedding(small_artifact, FULLRANK_ENGINE="torch"),
        embedding(small_artifact, "--engine", "onnx", FULLRANK_ENGINE="torch"),
    ]
    # Each engine is asked three times: twice by the comparison with the plain encoder, and for the image.
    assert ran == [name for name in ("onnx", "torch", "torch", "onnx") for _ in range(3)]
    for other in rows[1:]:
        np.testing.assert_allclose(other, rows[0], atol=1e-5)


def test_an_engine_that_cannot_be_chosen_is_named(small_artifact: Path) -> None:
    result = CliRunner().invoke(app, ["embed", "x.png", "--encoder", str(small_artifact), "--engine", "tensorrt"])
    assert result.exit_code == 2
    assert "'auto', 'onnx', 'torch'" in result.output
