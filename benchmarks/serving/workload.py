"""What every server and the offline loops run alike: the same weights, decoded and embedded by the same code.

`null` reduces the decoded pixels to 32 numbers: what remains is the server. `resnet18` is a ResNet-18 at 64 x 64,
`efficientnet` EfficientNet-Lite0 at 224 x 224, see efficientnet.py. Peers run them in eager PyTorch unless their name
says onnx.
"""

import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fullrank import Reference
from models.artifact import GRAPH, WEIGHTS, Architecture, Artifact, EncoderCard, load, save
from models.embedder import Embedder, normalize
from models.exporting import to_onnx
from models.preprocess import Preprocessing, decode

Model = Literal["null", "resnet18", "efficientnet"]
MODELS: tuple[Model, ...] = get_args(Model)
Loop = Literal["onnx", "torch", "bfloat16"]
MAX_BATCH, IMAGES = 32, 64
Rows = NDArray[np.float32]


class NullEmbedder(Embedder):
    """(n, 3, s, s) uint8 -> (n, 32): means of 32 equal runs of pixels, in place of a forward pass."""

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor | NDArray[np.uint8]) -> torch.Tensor:
        values = np.asarray(pixels)
        return torch.from_numpy(values.reshape(len(values), 32, -1).mean(2, dtype=np.float32))


class Workload:
    """Encoded images -> (n, d) float32 rows of unit norm, on one thread.

    engine: onnx as `fullrank serve` runs it; torch is eager PyTorch, as most people write it; bfloat16 is PyTorch in
    that precision, as `fullrank serve` runs it where FULLRANK_DTYPE says so.
    """

    def __init__(self, folder: Path, model: Model, engine: Loop = "torch") -> None:
        torch.set_num_threads(1)
        artifact = load(folder / model)
        self.preprocessing = artifact.card.preprocessing
        self.embed: Callable[[NDArray[np.uint8]], torch.Tensor]
        if model == "null":
            self.embed = NullEmbedder(artifact).embed
        elif model == "efficientnet" and engine == "torch":
            from benchmarks.serving.efficientnet import Eager

            self.embed = Eager(self.preprocessing)
        else:
            how: dict[str, Any] = {"dtype": torch.bfloat16} if engine == "bfloat16" else {"engine": engine}
            self.embed = Embedder(artifact, max_batch=MAX_BATCH, threads=1, **how).embed
        for count in (1, MAX_BATCH):
            self.embed(np.zeros((count, 3, self.preprocessing.size, self.preprocessing.size), np.uint8))

    @classmethod
    def from_environment(cls) -> "Workload":
        """As the benchmark asks of a server it starts."""
        model, engine = (os.environ[f"BENCH_{name}"] for name in ("MODEL", "ENGINE"))
        (chosen,) = (it for it in MODELS if it == model)
        (loop,) = (it for it in get_args(Loop) if it == engine)
        return cls(Path(os.environ["BENCH_FOLDER"]), chosen, loop)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        return decode(data, self.preprocessing)

    def forward(self, images: list[NDArray[np.uint8]]) -> Rows:
        rows: Rows = normalize(self.embed(np.stack(images))).numpy()
        return rows

    def __call__(self, data: list[bytes]) -> Rows:
        return self.forward([self.decode(it) for it in data])


def random_encoder(name: str, architecture: Architecture, size: int) -> Artifact:
    """An encoder of images of `size` pixels a side with random weights: only its cost matters."""
    torch.manual_seed(0)
    encoder = architecture.build().eval()
    preprocessing = Preprocessing(size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    card = EncoderCard(name=name, architecture=architecture, preprocessing=preprocessing, dimension=encoder.dimension)
    return Artifact(card, encoder)


def picture(side: int, seed: int) -> Image.Image:
    """Coloured noise with detail at every scale."""
    small = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def write_graph(encoder: Path, folder: Path) -> None:
    """The encoder as an ONNX file and its weights, for servers that run onnxruntime themselves."""
    artifact = load(encoder)
    if artifact.module is not None:
        to_onnx(artifact, folder)
        return
    folder.mkdir()
    for name in (GRAPH, WEIGHTS):
        shutil.copy(encoder / name, folder / name)


def prepare(folder: Path, models: Sequence[Model]) -> None:
    """Write the encoders and the images: JPEG of 16 KB, of 1 KB for null, and BMP to be stamped."""
    sizes: tuple[tuple[Model, int, int], ...] = (("null", 32, 32), ("resnet18", 64, 256), ("efficientnet", 224, 256))
    for model, size, side in sizes:
        if model not in models:
            continue
        if not (folder / model).is_dir():
            if model == "efficientnet":  # from another environment: see processes.bring_efficientnet
                artifact = load(folder / "efficientnet-lite0")
            else:
                width = 4 if model == "null" else 64
                artifact = random_encoder(model, Architecture(name="resnet18", width=width), size)
            embedder = (NullEmbedder if model == "null" else Embedder)(artifact)
            seen = torch.from_numpy(
                np.stack([np.asarray(picture(size, i)).transpose(2, 0, 1) for i in range(1200 if size < 200 else 400)])
            )
            rows = normalize(embedder.embed(seen))
            save(replace(artifact, reference=Reference.build(rows[::2], rows[1::2])), folder / model)
        if not (folder / f"{model}-onnx").is_dir():
            write_graph(folder / model, folder / f"{model}-onnx")
        for form, options in (("JPEG", {"quality": 85}), ("BMP", {})):
            images = folder / f"{model}-{form.lower()}"
            images.mkdir(exist_ok=True)
            for i in range(IMAGES):
                file = io.BytesIO()
                picture(side if form == "JPEG" else size, i).save(file, form, **options)
                (images / f"{i:04}").write_bytes(file.getvalue())
