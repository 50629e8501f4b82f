"""What is exported, read by the tools it is for, against the encoder in float64."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from models import exporting
from models.artifact import Artifact, EncoderCard, Preprocessing, Source, ViTArchitecture, load, save
from models.embedder import Embedder
from models.exporting import ExportError, to_onnx, to_safetensors, to_torch_export
from models.importers import ImportRefusedError, Options, import_encoder
from tests.support.images import photo


@pytest.fixture(scope="module")
def artifact(small_artifact: Path) -> Artifact:
    return load(small_artifact)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([np.asarray(photo((28, 28), seed).convert("L"))[None] for seed in range(5)])


@pytest.fixture(scope="module")
def expected(artifact: Artifact, images: np.ndarray) -> np.ndarray:
    how, exact = artifact.card.preprocessing, load_copy(artifact)
    with torch.no_grad():
        rows = exact((torch.from_numpy(images).double() / 255 - how.mean[0]) / how.std[0])
    return rows.numpy()


def load_copy(artifact: Artifact) -> torch.nn.Module:
    encoder = artifact.card.architecture.build()
    encoder.load_state_dict(artifact.encoder.state_dict())
    return encoder.eval().double()


def test_the_onnx_file_answers_as_the_encoder_and_stores_no_weight(
    artifact: Artifact, images: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    graph, weights = to_onnx(artifact, tmp_path / "new")
    onnx.checker.check_model(str(graph), full_check=True)
    assert graph.stat().st_size < 30_000
    session = onnxruntime.InferenceSession(str(graph))
    for count in (1, 2, 5):
        (rows,) = session.run(None, {"pixels": images[:count]})
        np.testing.assert_allclose(rows, expected[:count], atol=1e-4 * np.abs(expected).max())
    for name, tensor in load_file(weights).items():
        assert torch.equal(tensor, artifact.encoder.state_dict()[name])
    assert sorted(it.name for it in graph.parent.iterdir()) == ["encoder.onnx", "encoder.safetensors"]


def test_a_graph_beside_its_artifact_leaves_the_artifact_as_it_was(small_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in small_artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    to_onnx(load(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "encoder.onnx"} == before
    assert load(folder).card == load(small_artifact).card


def test_other_weights_are_not_overwritten(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes(b"somebody's")
    with pytest.raises(ExportError, match=r"encoder\.safetensors holds other weights; choose another folder"):
        to_onnx(artifact, tmp_path)
    assert [it.name for it in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_the_program_answers_as_the_encoder(
    artifact: Artifact, images: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    (path,) = to_torch_export(artifact, tmp_path)
    program = torch.export.load(path).module()
    for count in (1, 2, 5):
        with torch.no_grad():
            rows = program(torch.from_numpy(images[:count])).numpy()
        np.testing.assert_allclose(rows, expected[:count], atol=1e-4 * np.abs(expected).max())


def test_weights_come_back_bit_for_bit(artifact: Artifact, tmp_path: Path) -> None:
    to_safetensors(artifact, tmp_path / "there")
    back = load(tmp_path / "there")
    assert back.encoder.state_dict().keys() == artifact.encoder.state_dict().keys()
    for name, tensor in back.encoder.state_dict().items():
        assert torch.equal(tensor, artifact.encoder.state_dict()[name])
    assert back.card.revision == artifact.card.revision
    assert back.reference is None


def test_what_answers_otherwise_is_not_written(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporting.affine
    monkeypatch.setattr(exporting, "affine", lambda how: [it + 0.01 for it in honest(how)])
    monkeypatch.setattr(exporting.Whole, "forward", lambda self, pixels: self.encoder(pixels.float() * self.scale))
    with pytest.raises(ExportError, match=r"onnxruntime answers .* off the encoder, more than 0\.0001; nothing was"):
        to_onnx(artifact, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


VIT = ViTArchitecture(size=32, patch=8, width=16, depth=2, heads=2, hidden=32, registers=1, pool="class+mean")


def vit() -> Artifact:
    torch.manual_seed(0)
    how = Preprocessing(
        size=32, resize="short", to=40, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    source = Source(family="timm", file="x.pth", sha256="0" * 64, licence="MIT")
    card = EncoderCard(
        name="a-vit", architecture=VIT, preprocessing=how, dimension=32, source=source, nested_dimensions=(8, 16)
    )
    return Artifact(card, VIT.build().eval())


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_an_exported_graph_is_imported_again(kind: str, artifact: Artifact, tmp_path: Path) -> None:
    first = artifact if kind == "resnet" else vit()
    graph, _ = to_onnx(first, tmp_path / "exported")
    back, report = import_encoder(graph)
    save(back, tmp_path / "back")
    back = load(tmp_path / "back")
    how = first.card.preprocessing
    assert (back.card.name, back.card.preprocessing) == (first.card.name, how)
    assert back.card.nested_dimensions == first.card.nested_dimensions
    assert back.card.source is not None
    assert back.card.source.licence == ("MIT" if kind == "vit" else "")
    assert report.preprocessing_from == "the file's own record"
    pixels = np.random.default_rng(0).integers(0, 256, (5, how.channels, how.size, how.size), dtype=np.uint8)
    wanted = Embedder(first, engine="torch").embed(pixels)
    torch.testing.assert_close(Embedder(back).embed(pixels), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    # Weights are not stored twice: the graph is small, and each tensor that it reads is one of the encoder's.
    assert len(back.graph.model) < 40_000  # type: ignore[union-attr]
    for name, tensor in back.graph.weights.items():  # type: ignore[union-attr]
        assert torch.equal(tensor, first.encoder.state_dict()[name])


def test_a_graph_that_takes_pixels_needs_no_record_of_ours(artifact: Artifact, tmp_path: Path) -> None:
    graph, _ = to_onnx(artifact, tmp_path)
    model = onnx.load(graph, load_external_data=False)
    del model.metadata_props[:]
    graph.write_bytes(model.SerializeToString())
    back, report = import_encoder(graph, Options(settings={"size": "28", "to": "28"}))
    assert "inside the graph" in report.assumed["normalisation"]
    assert (back.card.preprocessing.mean, back.card.preprocessing.scale) == ((0.0,), 1.0)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    wanted = Embedder(artifact, engine="torch").embed(pixels)
    torch.testing.assert_close(Embedder(back).embed(pixels), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    with pytest.raises(ImportRefusedError, match=r"--set mean: its input takes pixels of 0 to 255"):
        import_encoder(graph, Options(settings={"mean": "0.5"}))
    model.metadata_props.add(key="fullrank", value='{"name": "x"}')
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ImportRefusedError, match=r"damaged \(preprocessing: .*export it again"):
        import_encoder(graph)
