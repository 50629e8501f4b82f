"""ONNX files from anywhere: ours to run with the same rows as plain torch, or refused with what to do."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from models.artifact import Artifact, ArtifactError, load, save
from models.embedder import Embedder
from models.engines import EngineError
from models.importers import ImportRefusedError, Options, Report, import_encoder

SIZE, WIDTH, ROWS = 32, 16, 24
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
RNG = np.random.default_rng(0)
WEIGHTS = {
    "stem": RNG.normal(size=(WIDTH, 3, 4, 4)).astype(np.float32) * 0.2,
    "last": RNG.normal(size=(ROWS, WIDTH)).astype(np.float32),
    "bias": RNG.normal(size=(ROWS,)).astype(np.float32),
}
NODES = (
    ("Conv", ["x", "stem"], ["map"], {"strides": [4, 4]}),
    ("Relu", ["map"], ["rectified"], {}),
    ("GlobalAveragePool", ["rectified"], ["mean"], {}),
    ("Flatten", ["mean"], ["flat"], {}),
    ("Gemm", ["flat", "last", "bias"], ["rows"], {"transB": 1}),
)


def written(
    path: Path,
    *,
    shape: tuple[Any, ...] = ("n", 3, SIZE, SIZE),
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("rows",),
    nodes: tuple[Any, ...] = NODES,
    kind: int = TensorProto.FLOAT,
    change: Callable[[Any], None] = lambda model: None,
    weights: dict[str, Any] | None = None,
    opset: int = 17,
) -> Path:
    made = [helper.make_node(op, given, result, **options) for op, given, result, options in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (WEIGHTS | (weights or {})).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def expected(pixels: Tensor, upto: str = "rows") -> Tensor:
    x = (pixels.float() / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    x = F.conv2d(x, torch.from_numpy(WEIGHTS["stem"]), stride=4).relu()
    return (
        x.mean((2, 3))
        if upto == "flat"
        else F.linear(x.mean((2, 3)), *(torch.from_numpy(WEIGHTS[k]) for k in ("last", "bias")))
    )


PIXELS = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def imported(path: Path, folder: Path, **options: Any) -> tuple[Artifact, Report]:
    artifact, report = import_encoder(path, Options(**options))
    save(artifact, folder)
    return load(folder), report


@pytest.mark.parametrize("external", [False, True])
def test_its_rows_are_those_of_the_same_arithmetic_in_torch(external: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx")
    if external:
        model = onnx.load(path)
        onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
        assert (tmp_path / "model.data").stat().st_size > 4000
    artifact, report = imported(path, tmp_path / "encoder")
    assert (artifact.card.dimension, report.architecture, report.family) == (ROWS, "ONNX graph", "onnx")
    assert report.assumed["size"] == "32, as its input is"
    assert artifact.graph is not None
    assert set(artifact.graph.weights) == {"stem", "last"}  # the bias is too small to be worth a place of its own
    torch.testing.assert_close(Embedder(artifact).embed(PIXELS), expected(PIXELS), rtol=1e-4, atol=1e-4)
    assert Embedder(artifact).embed(PIXELS[:1]).shape == (1, ROWS)
    # Any tool reads the stored graph, whose weights lie in the safetensors file and nowhere else.
    session = onnxruntime.InferenceSession(tmp_path / "encoder" / "encoder.onnx")
    (rows,) = session.run(["rows"], {"pixels": PIXELS.numpy()})
    torch.testing.assert_close(torch.from_numpy(rows), expected(PIXELS), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "encoder" / "encoder.onnx").stat().st_size < WEIGHTS["stem"].nbytes
    again = save(load(tmp_path / "encoder"), tmp_path / "copy")
    assert again.card.revision == artifact.card.revision


def test_a_graph_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.importers.onnx.PATIENCE", 0.5)
    scalar, flag = (helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("go", 9)))
    rows = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    again = [helper.make_node("Identity", [a], [b]) for a, b in (("go", "go_on"), ("r", "next"))]
    ends = [
        helper.make_tensor_value_info("go_on", 9, []),
        helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
    ]
    body = helper.make_graph(again, "body", [scalar, flag, rows], ends)
    loop = ("Loop", ["", "true", "once"], ["rows"], {"body": body})
    nodes = (*NODES[:-1], ("Gemm", ["flat", "last", "bias"], ["once"], {"transB": 1}), loop)
    path = written(tmp_path / "model.onnx", nodes=nodes, weights={"true": np.array(True)})
    with pytest.raises(ImportRefusedError, match=r"did not answer for 2 images in 0\.5 seconds"):
        imported(path, tmp_path / "encoder")


def test_a_graph_is_served_and_neither_trained_nor_run_by_torch(tmp_path: Path) -> None:
    artifact, _ = imported(written(tmp_path / "model.onnx"), tmp_path / "encoder")
    with pytest.raises(ArtifactError, match="can be served, but not trained"):
        artifact.encoder.parameters()
    with pytest.raises(EngineError, match="runs in the onnx engine"):
        Embedder(artifact, engine="torch")


def test_pools_tokens_and_maps(tmp_path: Path) -> None:
    tokens = (
        *NODES[:2],
        ("Reshape", ["rectified", "shape"], ["columns"], {}),
        ("Transpose", ["columns"], ["tokens"], {"perm": [0, 2, 1]}),
    )
    shape = {"shape": np.array([0, WIDTH, -1])}
    x = (PIXELS.float() / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    maps = F.conv2d(x, torch.from_numpy(WEIGHTS["stem"]), stride=4).relu()
    for opset in (17, 20):
        path = written(tmp_path / "tokens.onnx", nodes=tokens, outputs=("tokens",), weights=shape, opset=opset)
        for pool, wanted in (("cls", maps[:, :, 0, 0]), ("mean", maps.mean((2, 3))), (None, maps[:, :, 0, 0])):
            artifact, report = imported(path, tmp_path / "encoder", pool=pool)
            torch.testing.assert_close(Embedder(artifact).embed(PIXELS), wanted, rtol=1e-4, atol=1e-5)
            assert ("pool" in report.assumed) == (pool is None)
    artifact, _ = imported(
        written(tmp_path / "map.onnx", nodes=NODES[:2], outputs=("rectified",)), tmp_path / "encoder"
    )
    torch.testing.assert_close(Embedder(artifact).embed(PIXELS), maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_class_scores_are_no_embedding_and_the_tensor_before_them_is(tmp_path: Path) -> None:
    nodes = (*NODES[:-1], ("Gemm", ["flat", "last", "bias"], ["logits"], {"transB": 1}))
    path = written(tmp_path / "model.onnx", nodes=nodes, outputs=("logits",))
    with pytest.raises(ImportRefusedError, match=r"looks like class scores.*--set output=flat"):
        import_encoder(path)
    artifact, _report = imported(path, tmp_path / "encoder", settings={"output": "flat"})
    assert artifact.card.dimension == WIDTH
    torch.testing.assert_close(Embedder(artifact).embed(PIXELS), expected(PIXELS, "flat"), rtol=1e-4, atol=1e-5)
    assert import_encoder(path, Options(settings={"output": "logits"}))[0].card.dimension == ROWS


def outside(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "../secret.bin", "offset": "0", "length": "10"}.items():
        place = tensor.external_data.add()
        place.key, place.value = key, value


def elsewhere(location: str, length: int = 10) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        outside(model)
        places = model.graph.initializer[0].external_data
        places[0].value = location
        places[2].value = str(length)

    return change


def reshaped(*shape: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(shape)

    return change


CUSTOM = (*NODES[:1], ("Swish", ["map"], ["rectified"], {"domain": "com.example"}), *NODES[2:])
COUPLED = (*NODES, ("ReduceMean", ["rows"], ["centre"], {"axes": [0]}), ("Sub", ["rows", "centre"], ["out"], {}))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a path outside its folder": ({"change": outside}, r"lie in '\.\./secret\.bin', outside the model's folder"),
    "an absolute path": ({"change": elsewhere("/etc/passwd")}, "outside the model's folder"),
    "missing weights": ({"change": elsewhere("gone.data")}, "gone.data, which holds the weights of stem"),
    "weights too short": ({"change": elsewhere("short.data")}, "too short for stem"),
    "weights that never end": ({"change": elsewhere("zero.data")}, "outside the model's folder|no regular file"),
    "a pipe for weights": ({"change": elsewhere("pipe.data")}, "which holds the weights of stem, is no regular file"),
    "weights longer than their shape": (
        {"change": elsewhere("long.data", 8000)},
        "8000 bytes for stem, whose shape takes",
    ),
    "a shape without its numbers": ({"change": reshaped(1 << 25, 1 << 25)}, "stem is damaged"),
    "a fixed batch": ({"shape": (1, 3, SIZE, SIZE)}, "its batch is fixed at 1; export it again with a dynamic batch"),
    "two inputs": ({"inputs": ("x", "mask")}, r"it has 2 inputs \(x, mask\)"),
    "integers": ({"kind": TensorProto.INT64}, "takes neither floating-point numbers nor uint8"),
    "channels last": ({"shape": ("n", SIZE, SIZE, 3)}, "has 32 channels in second place"),
    "not square": ({"shape": ("n", 3, 32, 48)}, "its input is 32 x 48 pixels"),
    "an endless plane": ({"shape": ("n", 3, 1 << 30, 1 << 30)}, "1073741824 pixels high and wide; 8 to 2048 are"),
    "a vector": ({"shape": ("n", 3)}, "has 2 dimensions"),
    "a custom operator": ({"nodes": CUSTOM}, r"operators that are not ONNX's: com\.example\.Swish"),
    "a row that depends on its batch": (
        {"nodes": COUPLED, "outputs": ("out",)},
        "depends on the other images of its batch",
    ),
    "not finite": ({"weights": {"bias": np.full(ROWS, np.nan, np.float32)}}, "not finite"),
    "no such operator": (
        {"nodes": (*NODES[:1], ("Relux", ["map"], ["rectified"], {}), *NODES[2:])},
        "onnxruntime refuses",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    (tmp_path / "secret.bin").write_bytes(b"x" * 4000)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "short.data").write_bytes(b"x")
    (folder / "long.data").write_bytes(bytes(9000))
    (folder / "zero.data").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.data")
    path = written(folder / "model.onnx", **options)
    with pytest.raises(ImportRefusedError, match=message):
        import_encoder(path)


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    whole = written(path).read_bytes()
    for data in (b"", b"<html>", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(ImportRefusedError, match=r"no ONNX file|its input|no weights|no standard"):
            import_encoder(path)
    with pytest.raises(ImportRefusedError, match="No such file"):
        import_encoder(tmp_path / "gone.onnx")
    written(path)
    for options, message in (
        ({"pool": "mean"}, "one row an image already"),
        ({"settings": {"output": "nothing"}}, "computes no such tensor"),
        ({"settings": {"size": "64"}}, "its input is fixed at 32 x 32"),
    ):
        with pytest.raises(ImportRefusedError, match=message):
            import_encoder(path, Options(**options))  # type: ignore[arg-type]
