"""What every server and the offline loop run alike: the same weights, decoded and embedded by the same code.

`null` reduces the decoded pixels to 32 numbers: what remains is the server. `resnet18` is a ResNet-18 at 64 x 64.
"""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fullrank import Reference
from models.artifact import Architecture, Artifact, EncoderCard, load, save
from models.embedder import Embedder, normalize
from models.preprocess import Preprocessing, decode

Model = Literal["null", "resnet18"]
MODELS: tuple[Model, ...] = get_args(Model)
MAX_BATCH, IMAGES = 32, 64
Rows = NDArray[np.float32]


class NullEmbedder(Embedder):
    """(n, 3, s, s) uint8 -> (n, 32): means of 32 equal runs of pixels, in place of a forward pass."""

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor | NDArray[np.uint8]) -> torch.Tensor:
        values = np.asarray(pixels)
        return torch.from_numpy(values.reshape(len(values), 32, -1).mean(2, dtype=np.float32))


class Workload:
    """Encoded images -> (n, d) float32 rows of unit norm, on one torch thread."""

    def __init__(self, folder: Path, model: Model) -> None:
        torch.set_num_threads(1)
        artifact = load(folder / model)
        kind = NullEmbedder if model == "null" else Embedder
        self.embedder = kind(artifact, max_batch=MAX_BATCH)
        self.preprocessing = artifact.card.preprocessing
        self.embedder.warm_up((1, MAX_BATCH))

    @classmethod
    def from_environment(cls) -> "Workload":
        """As the benchmark asks of a server it starts."""
        model = os.environ["BENCH_MODEL"]
        return cls(Path(os.environ["BENCH_FOLDER"]), "null" if model == "null" else "resnet18")

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        return decode(data, self.preprocessing)

    def forward(self, images: list[NDArray[np.uint8]]) -> Rows:
        rows: Rows = normalize(self.embedder.embed(np.stack(images))).numpy()
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


def prepare(folder: Path) -> None:
    """Write the encoders and the images: JPEG of 16 KB for resnet18, of 1 KB for null, and BMP to be stamped."""
    for model, size, side in (("null", 32, 32), ("resnet18", 64, 256)):
        if not (folder / model).is_dir():
            artifact = random_encoder(model, Architecture(name="resnet18", width=4 if model == "null" else 64), size)
            embedder = (NullEmbedder if model == "null" else Embedder)(artifact)
            seen = torch.from_numpy(np.stack([np.asarray(picture(size, i)).transpose(2, 0, 1) for i in range(1200)]))
            rows = normalize(embedder.embed(seen))
            save(replace(artifact, reference=Reference.build(rows[::2], rows[1::2])), folder / model)
        for form, options in (("JPEG", {"quality": 85}), ("BMP", {})):
            images = folder / f"{model}-{form.lower()}"
            images.mkdir(exist_ok=True)
            for i in range(IMAGES):
                file = io.BytesIO()
                picture(side if form == "JPEG" else size, i).save(file, form, **options)
                (images / f"{i:04}").write_bytes(file.getvalue())
