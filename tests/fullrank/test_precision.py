"""A collapsed encoder reads as collapsed in whatever precision it is served: real encoders, real images."""

from pathlib import Path

import pytest
import torch

from benchmarks.precision import behind_rank, emulate_tf32, round_tf32, rows_in
from fullrank import Reference, SpectrumMonitor, measures
from models.artifact import load
from training.data import SAMPLE, read_fashion_mnist

RANK = 16
PRETRAINED = Path(__file__).parents[2] / "models" / "pretrained"


@pytest.fixture(scope="module")
def images():
    return torch.cat([read_fashion_mnist(SAMPLE, part).images[:600] for part in ("train", "test")])


@pytest.fixture(scope="module")
def shipped():
    return load(PRETRAINED / "fashion-directclr")


@pytest.fixture(scope="module")
def healthy(shipped, images):
    return rows_in(shipped, "float32", images)


def test_tf32_rounds_to_nearest_even_at_ten_bits():
    step = 2.0**-10
    given = torch.tensor([1 + 0.49 * step, 1 + 0.5 * step, 1 + 1.5 * step, -1 - 0.51 * step, 0.0, float("inf")])
    assert round_tf32(given).tolist() == [1.0, 1.0, 1 + 2 * step, -1 - step, 0.0, float("inf")]
    short = torch.randn(100).half().float()
    assert torch.equal(round_tf32(short), short)


def test_the_emulation_leaves_the_original_alone(shipped, images):
    before = {name: tensor.clone() for name, tensor in shipped.encoder.state_dict().items()}
    emulate_tf32(shipped.encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in shipped.encoder.state_dict().items())


@pytest.mark.parametrize("dtype", ["tf32", "float16", "bfloat16"])
def test_rounding_lies_below_the_floor_and_rank_k_reads_k(shipped, images, dtype):
    collapsed = behind_rank(shipped, RANK)
    exact, served = (rows_in(collapsed, name, images[:200]) for name in ("float32", dtype))
    floor = measures.noise_floor(dtype, exact.shape[1])
    noise = float((served - exact).var(0).mean())
    assert 0.02 * floor < noise < floor
    eigenvalues = torch.linalg.eigvalsh(served.T.cov())
    assert measures.numerical_rank(eigenvalues) > RANK  # what rounding invents
    assert measures.numerical_rank(eigenvalues, floor) == RANK


@pytest.mark.parametrize("dtype", ["float32", pytest.param("tf32", marks=pytest.mark.soak), "bfloat16"])
def test_the_verdict_on_a_collapsed_encoder_is_collapse_in_any_precision(shipped, images, healthy, dtype):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    basis, held_out = healthy[order].chunk(2)
    served_in = "float32" if dtype == "tf32" else dtype
    reference = Reference.build(basis, held_out, dtype=served_in, calibrate=False)
    rows = rows_in(behind_rank(shipped, RANK), dtype, images[order[:600]])
    with SpectrumMonitor(reference.dimension, reference, clock=lambda: 0.0) as monitor:
        monitor.observe(rows)
        monitor.flush(120)
        assert monitor.snapshot().verdict.state == "dimensional_collapse"
