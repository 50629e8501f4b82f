"""Pixels to rows against plain torch, folding, buckets, files by name."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.artifact import Artifact, load
from models.backbones.resnet import Name, ResNet
from models.decode import ImageError
from models.embedder import Embedder, normalize
from models.engines.cuda_graphs import buckets, smallest
from models.engines.torch_engine import folded
from models.preprocess import Preprocessing, decode, prepare
from models.references import ImageFolder
from tests.support.images import encoded, noise, photo


def test_embeddings_of_scaled_decodes_are_those_of_full_ones(small_artifact: Path) -> None:
    embedder = Embedder(load(small_artifact))
    files = [encoded(photo((500 + 37 * i, 400), i), "JPEG", quality=90) for i in range(8)]
    full = np.stack([prepare(Image.open(io.BytesIO(data)), embedder.card.preprocessing) for data in files])
    scaled = np.stack([decode(data, embedder.card.preprocessing) for data in files])
    assert not np.array_equal(full, scaled)
    cosine = torch.nn.functional.cosine_similarity(embedder.embed(full), embedder.embed(scaled))
    assert float(cosine.min()) > 0.995


def test_folding_changes_no_embedding_and_no_artifact(small_artifact: Path) -> None:
    artifact = load(small_artifact)
    before = {name: tensor.clone() for name, tensor in artifact.encoder.state_dict().items()}
    fused = folded(artifact.encoder)
    assert not [module for module in fused.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), artifact.encoder(x), rtol=1e-4, atol=1e-5)
    after = artifact.encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert load(small_artifact).card.revision == artifact.card.revision


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folding_takes_running_statistics_scales_and_shortcuts_along(name: Name) -> None:
    torch.manual_seed(0)
    encoder = ResNet(name, width=4, in_channels=3)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            module.running_mean, module.running_var = (
                torch.randn(len(module.weight)),
                torch.rand(len(module.weight)) + 0.5,
            )
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(encoder)(x), encoder.eval()(x), rtol=1e-4, atol=1e-4)


def test_every_batch_has_a_bucket_and_no_bucket_is_over_twice_a_batch() -> None:
    for largest in (1, 2, 3, 24, 32, 100):
        sizes = buckets(largest)
        assert sizes[-1] == largest
        assert all(n <= smallest(sizes, n) < 2 * n or n == 1 for n in range(1, largest + 1))
    with pytest.raises(ValueError, match="empty"):
        smallest(buckets(8), 9)


def test_embeddings_are_the_plain_forward_pass_batch_by_batch(small_artifact: Path) -> None:
    artifact = load(small_artifact)
    pixels = torch.randint(0, 256, (11, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = artifact.encoder((pixels.float() / 255 - 0.286) / 0.353)
    embedder = Embedder(artifact, max_batch=4)
    torch.testing.assert_close(embedder.embed(pixels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedder.embed(pixels.numpy()), expected, rtol=1e-4, atol=1e-5)
    assert embedder.embed(pixels[:0]).shape == (0, 32)


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 3, 28, 28), (3, 1, 27, 28)])
def test_wrong_shapes_are_refused(small_artifact: Path, shape: tuple[int, ...]) -> None:
    embedder = Embedder(load(small_artifact))
    with pytest.raises(ValueError, match=r"takes uint8 \(n, 1, 28, 28\)"):
        embedder.embed(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        embedder.embed(torch.zeros(2, 1, 28, 28))


def test_files_are_named_when_they_are_bad(small_artifact: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(noise((30, 30))))
    bad.write_bytes(b"?")
    embedder = Embedder(load(small_artifact))
    assert embedder.embed_files([good, good]).shape == (2, 32)
    with pytest.raises(ImageError, match=r"bad\.png: the bytes are no image"):
        embedder.embed_files([good, bad])


def test_normalize_leaves_zero_rows_zero() -> None:
    rows = normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_large_images_are_embedded_a_few_at_a_time(small_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of 256 images of 224 x 224 take gigabytes. The rows do not depend on the size of a pass."""
    small = Embedder(load(small_artifact))
    assert small.max_batch == 256
    card = small.card.model_copy(update={"preprocessing": small.card.preprocessing.model_copy(update={"size": 224})})
    artifact = Artifact(card, load(small_artifact).encoder)
    large = Embedder(artifact, engine="torch")
    assert large.max_batch == 20
    assert Embedder(artifact, max_batch=48, engine="torch").max_batch == 48
    for threads, most in ((1, 5), (2, 10)):  # onnxruntime keeps a pass in the caches of its threads
        assert Embedder(artifact, max_batch=48, engine="onnx", threads=threads).max_batch == most
    assert Embedder(artifact, max_batch=3, engine="onnx", threads=1).max_batch == 3
    sizes = list[int]()
    engine = large.engine

    class Counted:
        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            sizes.append(len(pixels))
            return engine(pixels)

    monkeypatch.setattr(large, "engine", Counted())
    pixels = np.random.default_rng(0).integers(0, 256, (45, 1, 224, 224), dtype=np.uint8)
    rows = large.embed(pixels)
    assert sizes == [20, 20, 5]
    torch.testing.assert_close(rows, torch.from_numpy(engine(pixels)), rtol=1e-4, atol=1e-5)


def test_a_folder_of_large_images_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    for seed in range(9):
        photo((60, 50), seed).save(tmp_path / f"{seed}.png")
    folder = ImageFolder.of(tmp_path)
    sizes = [len(part) for part in folder.pixels(Preprocessing(size=1024, channels=1, mean=(0.5,), std=(0.5,)))]
    assert sizes == [4, 4, 1]
