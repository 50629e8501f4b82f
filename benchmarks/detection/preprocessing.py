"""Faults of preprocessing and of bookkeeping that leave the covariance nearly as it was.

Each sits in the service and, where a client can do it, in front of it. They were missed before the shift of the mean in
the tail was read.
"""

import copy
import io
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from benchmarks.detection.cases import Bench, Case
from models.artifact import Artifact
from models.embedder import Embedder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def preprocessing(bench: Bench, other: Artifact) -> list[Case]:
    """All of them, of an encoder of colour images; `other` is not used."""
    cases = [
        *bench.pixels("BGR for RGB", lambda images: images.flip(1)),
        *bench.pixels("gamma 2.2", lambda images: (255 * (images / 255) ** 2.2).round().to(torch.uint8)),
        *bench.pixels("JPEG of quality 8", jpeg),
        *bench.pixels("2 bits a pixel", lambda images: (images >> 6) * 85),
    ]
    for name, (mean, std) in (("ImageNet's mean and std", IMAGENET), ("mean and std of 0.5", HALF)):
        wrong = copy.deepcopy(bench.artifact)
        changed = wrong.card.preprocessing.model_copy(update={"mean": mean, "std": std})
        wrong = replace(wrong, card=wrong.card.model_copy(update={"preprocessing": changed}))
        cases.append(bench.forwarded(name, Embedder(wrong)))
    cases.append(bench.changed("each answer handed to the next request", lambda rows: rows.roll(1, 0)))
    few = torch.randperm(len(bench.clean), generator=bench.generator)[:200]
    repeated = replace(bench.usual, name="200 images, repeated, no keys", kind="traffic", draw=bench.some(few))
    return [*cases, repeated, bench.usual]


def jpeg(images: Tensor, quality: int = 8) -> Tensor:
    """Stored as JPEG of this quality and read again: (n, 1 or 3, s, s) uint8."""
    stored = []
    for image in images:
        file = io.BytesIO()
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
        read = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
        stored.append(read.view(*image.shape[1:], len(image)))
    return torch.stack(stored).permute(0, 3, 1, 2).contiguous()
