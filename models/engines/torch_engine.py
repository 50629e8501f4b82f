"""The torch engine. It folds batch norms into the convolutions, and on CUDA it records passes as graphs.

It works on a copy: the artifact's own encoder, and so its revision, do not change.
"""

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format, fuse_conv_bn_eval

from models.engines.cuda_graphs import Graphs, buckets
from models.engines.engine import Pixels, Rows, affine
from models.engines.packed import to_bfloat16
from models.preprocess import Preprocessing


class TorchEngine:
    """Runs an encoder in eager PyTorch on any device, in float32 or bfloat16. Uses torch's own number of threads."""

    name = "torch"

    def __init__(
        self,
        encoder: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_batch: int = 256,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.max_batch = max_batch
        self._shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
        self._encoder = folded(encoder)
        takes_float32 = device.type == "cpu" and dtype == torch.bfloat16 and to_bfloat16(self._encoder)
        self._takes = torch.float32 if takes_float32 else dtype
        if not takes_float32:
            self._encoder.to(device, dtype)
        self._scale, self._offset = (it.to(device) for it in affine(preprocessing))
        self._graphs: Graphs | None = None

    @torch.inference_mode()
    def __call__(self, pixels: Pixels) -> Rows:
        batch = torch.from_numpy(pixels)
        rows = self._pass(batch.to(self.device, non_blocking=True)) if self._graphs is None else self._graphs(batch)
        return rows.float().cpu().numpy()

    def _pass(self, batch: Tensor) -> Tensor:
        x = batch.to(torch.float32, memory_format=torch.channels_last).mul_(self._scale).add_(self._offset)
        # By default cuDNN rounds float32 convolutions to TF32. References of float32 do not allow for that much noise.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext()
        with exact:
            rows: Tensor = self._encoder(x.to(self._takes))
        return rows

    @torch.inference_mode()
    def record(self) -> None:
        """On CUDA, record a graph for every bucket up to max_batch. From then on, all passes use these graphs."""
        if self.device.type == "cuda" and self._graphs is None:
            self._graphs = Graphs(self._pass, self._shape, buckets(self.max_batch), self.device)


def folded(encoder: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch norm folded into the convolution before it. Only rounding differs.

    With running statistics a batch norm is y = g (x - m) / sqrt(v + e) + b per channel. So it scales the convolution's
    weights and shifts its bias.
    """
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                # bn1 follows conv1; in a shortcut, a Sequential, 1 follows 0.
                before = name.replace("bn", "conv") if name.startswith("bn") else str(int(name) - 1)
                convolution = module.get_submodule(before)
                assert isinstance(convolution, nn.Conv2d)
                setattr(module, before, fuse_conv_bn_eval(convolution, child))
                setattr(module, name, nn.Identity())
    converted: nn.Module = convert_conv2d_weight_memory_format(encoder, torch.channels_last)
    return converted
