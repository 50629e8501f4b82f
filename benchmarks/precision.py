"""The rank that rounding invents: shipped encoders served in bfloat16, float16 and emulated TF32, beside float32.

    python -m benchmarks.precision

Each encoder is measured as it is and behind a last linear layer of rank 16, a true dimensional collapse. TF32 exists on
Nvidia GPUs only; here it is emulated on the CPU by cutting the inputs and weights of every convolution and linear layer
to 10 bits of mantissa, to nearest; sums stay in float32, as on the GPU. Noise is the variance of the difference to
float32 rows, L2-normalised, per dimension, in units of `measures.noise_floor`.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fullrank import measures
from fullrank.rows import unit
from models.artifact import Artifact, load
from models.embedder import Embedder
from tools.demo import COLLAPSED, PRETRAINED
from training.data import SAMPLE, read_fashion_mnist

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def round_tf32(x: Tensor) -> Tensor:
    """float32 rounded to nearest, ties to even, at 10 bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    kept = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


def emulate_tf32(module: nn.Module) -> nn.Module:
    """A copy whose convolutions and linear layers multiply in TF32."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = round_tf32(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, inputs: (round_tf32(inputs[0]),))
    return module


def behind_rank(artifact: Artifact, rank: int, seed: int = 0) -> Artifact:
    """The encoder followed by a random linear layer of this rank and the same width."""
    d, generator = artifact.card.dimension, torch.Generator().manual_seed(seed)
    layer = nn.Linear(d, d, bias=False)
    layer.weight.data = torch.randn(d, rank, generator=generator) @ torch.randn(rank, d, generator=generator) / d
    return with_encoder(artifact, nn.Sequential(artifact.encoder, layer))


def with_encoder(artifact: Artifact, encoder: nn.Module) -> Artifact:
    """The artifact around another network of the same inputs and outputs, which no card could describe."""
    return replace(artifact, module=encoder.eval())  # type: ignore[arg-type]


def rows_in(artifact: Artifact, dtype: str, images: Tensor) -> Tensor:
    """(n, c, h, w) uint8 images -> (n, d) unit rows in float64, computed in one of DTYPES."""
    if dtype == "tf32":
        artifact = with_encoder(artifact, emulate_tf32(artifact.encoder))
    return unit(Embedder(artifact, dtype=DTYPES[dtype]).embed(images).double())


def main() -> None:
    """Print one line for each encoder and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", type=Path, default=[PRETRAINED / "fashion-directclr", COLLAPSED])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.cat([read_fashion_mnist(SAMPLE, part).images for part in ("train", "test")])
    print(
        "| encoder | dtype | rank without floor | with floor | effective rank | noise: mean | noise: strongest axis |"
    )
    print("|---|---|---|---|---|---|---|")
    for folder in options.encoder:
        shipped, name = load(folder), folder.name
        for title, artifact in ((name, shipped), (f"{name}, rank {options.rank}", behind_rank(shipped, options.rank))):
            exact = rows_in(artifact, "float32", images)
            for dtype in DTYPES:
                rows = rows_in(artifact, dtype, images)
                values, floor = torch.linalg.eigvalsh(rows.T.cov()), measures.noise_floor(dtype, rows.shape[1])
                noise = torch.linalg.eigvalsh((rows - exact).T.cov()) / floor
                ranks = f"{measures.numerical_rank(values)} | {measures.numerical_rank(values, floor)}"
                shown = "– | –" if dtype == "float32" else f"{float(noise.mean()):.2f} | {float(noise.max()):.1f}"
                print(f"| {title} | {dtype} | {ranks} | {measures.effective_rank(values):.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
