"""bfloat16 on a CPU: what is served is near float32, whatever the batch, or it is refused with the figures."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank import Reference, SpectrumMonitor
from models.artifact import Architecture, Artifact, ArtifactError, EncoderCard, load
from models.embedder import Embedder, normalize
from models.engines import PARITY_COSINE, EngineError, start
from models.engines.packed import PackedConv2d, Stem, to_bfloat16
from models.gate import PRECISION_IMAGES
from models.preprocess import Preprocessing
from service.settings import PRETRAINED
from tests.support.encoders import write_encoder
from tests.support.images import pictures

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def shipped() -> Artifact:
    return load(PRETRAINED / "cifar10-directclr")


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1}, {"padding": (2, 0), "dilation": 2}, {"groups": 8}, {"groups": 4, "bias": False}],
)
def test_a_packed_convolution_is_the_convolution(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    stem, plain = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, **settings)  # type: ignore[arg-type]
    rounded = copy.deepcopy(plain).to(BF16).double().requires_grad_(False)
    encoder = nn.Sequential(stem, nn.Sequential(plain)).requires_grad_(False)
    x = torch.randn(3, 8, 13, 11).to(memory_format=torch.channels_last)
    expected = stem(x)
    assert to_bfloat16(encoder)
    assert isinstance(encoder[0], Stem)
    assert isinstance(encoder[1][0], PackedConv2d)
    assert torch.equal(encoder[0](x), expected.to(BF16))  # from float32 weights and pixels, rounded once
    torch.testing.assert_close(encoder(x).double(), rounded(expected.to(BF16).double()), rtol=2**-8, atol=2**-8)


def test_convolutions_with_other_borders_stay_as_they_are() -> None:
    others = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding="same")
    encoder = nn.Sequential(nn.Conv2d(1, 4, 1), *others).requires_grad_(False)
    assert to_bfloat16(encoder)
    assert [type(it) for it in encoder] == [Stem, nn.Conv2d, nn.Conv2d]
    assert encoder(torch.zeros(1, 1, 8, 8)).dtype == BF16


def test_an_encoder_without_a_convolution_takes_bfloat16() -> None:
    encoder = nn.Linear(3, 2)
    assert not to_bfloat16(encoder)
    assert encoder.weight.dtype == BF16


def test_it_runs_in_torch_near_float32_and_says_so(shipped: Artifact) -> None:
    assert shipped.canary is not None
    pixels = shipped.canary.images
    fast, exact = Embedder(shipped, dtype=BF16), Embedder(shipped)
    assert fast.runs_in == "the torch engine, bfloat16 on cpu"
    assert exact.runs_in == "the onnx engine, float32 on cpu"
    rows, wanted = fast.embed(pixels), exact.embed(pixels)
    assert rows.dtype == torch.float32
    cosines = nn.functional.cosine_similarity(rows, wanted)
    assert PARITY_COSINE < float(cosines[:PRECISION_IMAGES].min()) < 0.9999999  # near, and not the same
    assert int((cosines < PARITY_COSINE).sum()) <= 3  # of 256: the gate asks the first of them


def test_every_canary_image_of_an_encoder_is_near_float32() -> None:
    other = load(PRETRAINED / "cifar10-byol")
    assert other.canary is not None
    fast, exact = Embedder(other, dtype=BF16), Embedder(other)
    cosines = nn.functional.cosine_similarity(fast.embed(other.canary.images), exact.embed(other.canary.images))
    assert 0.9999 < float(cosines.min()) < 0.9999999  # near, and not the same


def test_a_row_does_not_depend_on_its_batch(shipped: Artifact) -> None:
    assert shipped.canary is not None
    pixels = shipped.canary.images[:33]
    embedder = Embedder(shipped, dtype=BF16)
    whole = normalize(embedder.embed(pixels).double())
    for size in (1, 2, 7, 32):
        parts = torch.cat([embedder.embed(pixels[at : at + size]) for at in range(0, 33, size)])
        assert float((normalize(parts.double()) * whole).sum(1).min()) > 0.9999, size


def test_a_reference_made_in_float32_holds_and_no_batch_changes_the_verdict(tmp_path: Path) -> None:
    """Healthy rows in bfloat16 are healthy by it, and collapsed rows are collapsed, embedded one by one or together."""
    artifact = write_encoder(tmp_path / "wide", 2, width=16)
    assert artifact.reference is not None
    assert artifact.canary is not None
    assert artifact.reference.dtype == "float32"
    pixels = torch.from_numpy(pictures(640, 5)[:, None])
    embedder = Embedder(artifact, dtype=BF16)
    canary = embedder.embed(artifact.canary.images)
    cut = artifact.reference.basis[:, :4].float()
    effective = []
    for size in (3, 32):
        rows = torch.cat([embedder.embed(pixels[at : at + size]) for at in range(0, len(pixels), size)])
        unit = normalize(rows)
        low = artifact.reference.mean.float() + (unit - artifact.reference.mean.float()) @ cut @ cut.T
        told = [verdict(artifact.reference, it, canary) for it in (unit, low.to(BF16).float())]
        assert [it[0] for it in told] == ["healthy", "dimensional_collapse"], told
        effective.append(told[0][1])
    assert effective[0] == pytest.approx(effective[1], rel=1e-2)


def verdict(reference: Reference, rows: torch.Tensor, canary: torch.Tensor) -> tuple[str, float, str]:
    """The state, the effective rank and the reason of a monitor that saw these rows and this canary."""
    with SpectrumMonitor(rows.shape[1], reference=reference) as monitor:
        monitor.record_canary(canary)
        monitor.observe(rows)
        snapshot = monitor.snapshot(wait=60)
        (window, *_) = snapshot.windows.values()
        return snapshot.verdict.state, window.effective_rank, snapshot.verdict.reason


class Raised(nn.Module):
    """(n, 1, 28, 28) -> (n, 32): pixels about 100, where bfloat16's numbers lie half a unit apart, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, 300:332] + 100 - 100


def test_an_encoder_too_coarse_for_it_is_refused_with_the_figures() -> None:
    how = Preprocessing(size=28, channels=1, mean=(0.5,), std=(0.25,))
    architecture = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3")
    card = EncoderCard(name="coarse", architecture=architecture, preprocessing=how, dimension=32)
    artifact = Artifact(card, Raised().eval())
    start(artifact, "torch")
    message = r"coarse: the torch engine's embeddings in bfloat16 have cosine 0\.\d+ .* 0\.9999 .*Compute in float32"
    with pytest.raises(ArtifactError, match=message):
        start(artifact, dtype=BF16)


def test_the_onnx_engine_does_not_run_it(shipped: Artifact) -> None:
    with pytest.raises(EngineError, match=r"not on cpu in torch\.bfloat16; the torch engine can"):
        start(shipped, "onnx", dtype=BF16)


@pytest.mark.parametrize(
    ("instructions", "warned"), [({"avx2"}, True), ({"avx2", "amx_bf16"}, False), ({"bf16"}, False), (set(), False)]
)
def test_a_processor_that_emulates_it_is_warned_of(
    instructions: set[str],
    warned: bool,
    shipped: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("models.processor.cpu_instructions", lambda: instructions)
    with caplog.at_level(logging.WARNING, "fullrank.engines"):
        rows = start(shipped, dtype=BF16)(np.zeros((1, 3, 32, 32), np.uint8))
        start(shipped)
    assert np.isfinite(rows).all()
    assert ("this processor does not multiply in bfloat16" in caplog.text) == warned
    assert len(caplog.records) == warned
