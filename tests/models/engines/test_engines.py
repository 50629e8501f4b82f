"""Choosing an engine, its threads, its independence of the batch, and its refusal to serve something else."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.artifact import Architecture, Artifact, ArtifactError, EncoderCard, Graph, load
from models.embedder import Embedder
from models.engines import EngineError, protobuf, start
from models.engines.onnx_engine import OnnxEngine
from models.preprocess import Preprocessing

THREADS = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from models.artifact import load
from models.engines import start
import numpy as np
artifact = load(sys.argv[1])
count = lambda: len(list(pathlib.Path("/proc/self/task").iterdir()))
counts = [count()]
for threads in (1, 2, 4):
    engine = start(artifact, "onnx", threads=threads)
    engine(np.zeros((8, 1, 28, 28), np.uint8))
    counts.append(count())
    del engine
many = [start(artifact, "onnx", threads=2) for _ in range(3)]
for engine in many:
    engine(np.zeros((8, 1, 28, 28), np.uint8))
counts.append(count())
del engine, many[1:]
counts.append(count())
print(json.dumps({"counts": counts, "onnx": "onnx" in sys.modules, "compiler": "torch._dynamo" in sys.modules}))
"""


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 28, 28), np.uint8)


def made(encoder: nn.Module, **changes: object) -> Artifact:
    """A grey 28-pixel artifact around an encoder of 32 dimensions."""
    how = Preprocessing(size=28, channels=1, mean=(0.5,), std=(0.25,))
    architecture = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3")
    card = EncoderCard(name="made", architecture=architecture, preprocessing=how, dimension=32)
    return replace(Artifact(card, encoder.eval()), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def artifact(small_artifact: Path) -> Artifact:
    return load(small_artifact)


def test_auto_is_onnx_on_a_cpu_in_float32_and_torch_elsewhere(artifact: Artifact) -> None:
    assert start(artifact).name == "onnx"
    assert start(artifact, "torch").name == "torch"
    assert Embedder(artifact, engine="torch").engine.name == "torch"
    with pytest.raises(EngineError, match=r"not on cpu in torch\.bfloat16; the torch engine can"):
        start(artifact, "onnx", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_both_engines_are_the_plain_encoder(artifact: Artifact, name: str) -> None:
    pixels, how = images(9), artifact.card.preprocessing
    with torch.no_grad():
        x = (torch.from_numpy(pixels).double() / 255 - how.mean[0]) / how.std[0]
        expected = artifact.encoder.double()(x).float()
    artifact.encoder.float()
    rows = start(artifact, name)(pixels)  # type: ignore[arg-type]
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-4)
    cosine = nn.functional.cosine_similarity(torch.from_numpy(rows), expected)
    assert float(cosine.min()) > 1 - 1e-6


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_a_row_does_not_depend_on_its_batch(artifact: Artifact, name: str) -> None:
    pixels, engine = images(33), start(artifact, name)  # type: ignore[arg-type]
    whole = engine(pixels)
    unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    for size in (1, 2, 3, 7, 16, 32):
        parts = np.concatenate([engine(pixels[at : at + size]) for at in range(0, 33, size)])
        np.testing.assert_allclose(parts / np.linalg.norm(parts, axis=1, keepdims=True), unit, atol=1e-6)


def test_threads_are_those_asked_for_whatever_the_host_has(small_artifact: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", THREADS, str(small_artifact)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    before, *later = found["counts"]
    assert [it - before for it in later[:3]] == [0, 1, 3]
    # Each of several encoders has its own helpers, and gives them back. See docs/decisions/engines.md.
    assert [it - before for it in later[3:]] == [3, 1]
    assert not found["onnx"]  # the package is for exporting and tests
    assert not found["compiler"]  # which would cost seconds and 150 MB


def test_an_encoder_without_a_graph_runs_in_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(2).flatten(1)[:, :32]

    with caplog.at_level(logging.WARNING, "fullrank.engines"):
        engine = start(made(Sums()))
    assert engine.name == "torch"
    assert "made runs in the torch engine: there is no ONNX graph of the operation cumsum" in caplog.text
    with pytest.raises(EngineError, match="the operation cumsum; use the torch engine"):
        start(made(Sums()), "onnx")


def test_an_engine_that_says_something_else_is_refused_with_the_figures(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = OnnxEngine.__call__
    monkeypatch.setattr(OnnxEngine, "__call__", lambda self, pixels: honest(self, pixels) + 1)
    with pytest.raises(ArtifactError, match=r"the onnx engine's .* cosine 0\.\d{6} with .* at least 0\.9999"):
        start(artifact)
    monkeypatch.setattr(OnnxEngine, "__call__", lambda self, pixels: honest(self, pixels) * np.nan)
    with pytest.raises(ArtifactError, match=r"cosine -1\.000000"):
        start(artifact)


def test_rows_that_prove_nothing_are_not_compared(artifact: Artifact) -> None:
    """All-zero rows have no direction; rows that overflow in PyTorch too are the service's to report."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :32] * self.factor

    assert start(made(Times(0.0))).name == "onnx"
    assert not np.isfinite(start(made(Times(3e38)))(images(2))).all()


def test_a_graph_that_onnxruntime_refuses_is_an_error_with_its_reason() -> None:
    with pytest.raises(EngineError, match="onnxruntime refuses the graph: "):
        OnnxEngine(b"not a model", {}, 1)


def linear_graph(location: str, outputs: int = 3) -> bytes:
    """rows = pixels of (n, 1, 28, 28) @ w, an external (784, outputs)."""
    nodes = [
        protobuf.node("Cast", ["pixels"], ["float"], {"to": protobuf.FLOAT}),
        protobuf.node("Flatten", ["float"], ["flat"]),
        protobuf.node("MatMul", ["flat", "w"], ["rows"]),
    ]
    weights = [protobuf.external("w", (784, outputs), location, 0)]
    return protobuf.model(nodes, weights, ("pixels", ("n", 1, 28, 28)), ("rows", ("n", outputs)), "test")


@pytest.mark.parametrize("location", ["here.bin", "../outside.bin", "{root}/outside.bin"])
def test_a_graph_opens_no_file_whatever_path_it_names(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "within").mkdir()
    for place in ("outside.bin", "within/here.bin"):
        (tmp_path / place).write_bytes(bytes(4 * 784 * 3))
    monkeypatch.chdir(tmp_path / "within")
    model = linear_graph(location.format(root=tmp_path))
    with pytest.raises(EngineError, match="onnxruntime refuses the graph"):
        OnnxEngine(model, {}, 1)
    rows = OnnxEngine(model, {"w": torch.ones(784, 3)}, 1)(images(2))
    np.testing.assert_allclose(rows, images(2).reshape(2, -1).sum(1, keepdims=True).repeat(3, 1), rtol=1e-6)


def graph_artifact(model: bytes, weights: dict[str, torch.Tensor], dimension: int) -> Artifact:
    how = Preprocessing(size=28, channels=1, mean=(0.0,), std=(1.0,))
    card = EncoderCard(name="graph", graph="encoder.onnx", preprocessing=how, dimension=dimension)
    return Artifact(card, None, graph=Graph(model, weights))


def test_a_graph_that_is_the_encoder_is_tried_before_it_serves() -> None:
    weights = {"w": torch.ones(784, 3)}
    assert start(graph_artifact(linear_graph("x"), weights, 3)).name == "onnx"
    with pytest.raises(EngineError, match="graph is an ONNX graph: it runs in the onnx engine"):
        start(graph_artifact(linear_graph("x"), weights, 3), "torch")
    with pytest.raises(ArtifactError, match=r"gives float32 \(3, 3\), not float32 \(3, 5\)"):
        start(graph_artifact(linear_graph("x"), weights, 5))
    sums = [
        protobuf.node("Cast", ["pixels"], ["float"], {"to": protobuf.FLOAT}),
        protobuf.node("Flatten", ["float"], ["flat"]),
        protobuf.node("ReduceMean", ["flat"], ["mean"], {"keepdims": 1}),
        protobuf.node("Add", ["flat", "mean"], ["rows"]),
    ]
    mixing = protobuf.model(sums, [], ("pixels", ("n", 1, 28, 28)), ("rows", ("n", 784)), "test")
    with pytest.raises(ArtifactError, match="another row in a batch than alone"):
        start(graph_artifact(mixing, {}, 784))
