"""Faults injected where they would sit in the serving path: the canary finds each before it has gone round once.

JPEG of a low quality is among them as a service would do it to its pixels, in a cache that stores thumbnails, say.
Where clients do it, in front of the service, no canary can see it: it never passes there.
"""

import asyncio
import io
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.embedder import Embedder
from service.encoders.registry import Service
from service.encoders.served import Served
from service.engine.queue import Pixels, Rows
from service.settings import PRETRAINED
from tests.support.app import Embed, Start, handed_to_the_next

pytestmark = pytest.mark.anyio
# A family's own figures, with which another's weights do not work.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def jpeg(pixels: Pixels) -> Pixels:
    stored = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=8)
        stored.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(stored))


def normalised_for_another(served: Served, honest: Embed) -> Embed:
    mean, std = IMAGENET
    preprocessing = served.artifact.card.preprocessing.model_copy(update={"mean": mean, "std": std})
    card = served.artifact.card.model_copy(update={"preprocessing": preprocessing})
    wrong = Embedder(replace(served.artifact, card=card), threads=1)

    def embed(pixels: Pixels) -> Rows:
        rows: Rows = wrong.embed(pixels).numpy()
        return rows

    return embed


def noisy(served: Served, honest: Embed) -> Embed:
    """Noise of a tenth of each embedding's length, which a cosine of 0.99 lets pass."""
    draw = np.random.default_rng(0)

    def embed(pixels: Pixels) -> Rows:
        rows = honest(pixels)
        noise = draw.normal(size=rows.shape).astype(np.float32)
        return rows + 0.1 * noise * np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])

    return embed


def of_pixels(change: Callable[[Pixels], Pixels]) -> Callable[[Served, Embed], Embed]:
    return lambda _, honest: lambda pixels: honest(change(pixels))


FAULTS: dict[str, Callable[[Served, Embed], Embed]] = {
    "BGR for RGB": of_pixels(lambda pixels: np.ascontiguousarray(pixels[:, ::-1])),
    "mean and std of another family": normalised_for_another,
    "answers handed to the next request": handed_to_the_next,
    "gamma of 2.2": of_pixels(lambda pixels: (255 * (pixels / 255) ** 2.2).round().astype(np.uint8)),
    "JPEG of quality 8": of_pixels(jpeg),
    "2 bits a pixel": of_pixels(lambda pixels: (pixels >> 6) * np.uint8(85)),
    "noise of a tenth": noisy,
}


def embedded(service: Service) -> float:
    """Canary images embedded so far."""
    return service.metrics.registry.get_sample_value("fullrank_canary_images_total", {"result": "finite"}) or 0.0


async def test_each_fault_is_found_before_the_canary_has_gone_round_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.watching.canary.SHARE", 1.0)  # so that a round takes seconds
    encoder = PRETRAINED / "cifar10-directclr"
    async with start(encoder=encoder, canary_period=0.5) as (client, service):
        served = service.current
        assert served.monitor is not None
        assert served.artifact.canary is not None
        round_of = len(served.artifact.canary.images)
        honest = served.embed

        async def until(state: str) -> None:
            async with asyncio.timeout(240):
                while served.monitor.snapshot().verdict.state != state:
                    await asyncio.sleep(0.01)

        for name, fault in FAULTS.items():
            served.embed = fault(served, honest)  # type: ignore[method-assign]
            before = embedded(service)
            await until("model_fault")
            # The images of one more pass may have been on their way when the fault began.
            assert embedded(service) - before <= round_of, name
            told = (await client.get("/spectrum")).json()
            assert told["canary"]["angle_degrees"] > told["thresholds"]["canary_angle"], name
            assert "nearest neighbours" in told["verdict"]["reason"]
            served.embed = honest  # type: ignore[method-assign]
            await until("insufficient_data")


async def test_the_threshold_follows_from_the_precision_that_serves(start: Start) -> None:
    async with start(encoder=PRETRAINED / "cifar10-directclr", canary_period=600) as (_, service):
        monitor = service.current.monitor
        assert monitor is not None
        assert monitor.reference is not None
        assert monitor.reference.canary_noise < 0.01
        least = monitor.snapshot().thresholds["canary_angle"]
        assert least == pytest.approx(0.1 * monitor.reference.canary_nearest)
        assert 2 < least < 3
    async with start(encoder=PRETRAINED / "cifar10-directclr", canary_period=600, dtype="bfloat16") as (
        client,
        service,
    ):
        engine = (await client.get("/info")).json()["engine"]
        assert engine == {"name": "torch", "device": "cpu", "dtype": "bfloat16", "threads": 1}
        ready = (await client.get("/readyz")).json()
        assert (ready["engine"], ready["dtype"]) == ("torch", "bfloat16")
        monitor = service.current.monitor
        assert monitor is not None
        assert monitor.reference is not None
        noise = monitor.reference.canary_noise
        assert 0.05 < noise < 1
        assert monitor.snapshot().thresholds["canary_angle"] == pytest.approx(max(least, 3 * noise))
        assert await asyncio.to_thread(monitor.flush, 60)
        assert monitor.snapshot().verdict.state == "insufficient_data"  # no rows yet, and no fault
        assert torch.isfinite(torch.tensor(monitor.snapshot().canary.angle_degrees))


async def test_a_precision_too_coarse_for_the_canary_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.encoders.prepare.PARITY_COSINE", 0.999999)
    async with start(encoder=PRETRAINED / "cifar10-directclr", dtype="bfloat16") as (client, service):
        assert service.failure is not None
        assert re.search(r"in bfloat16 .* cosine 0\.9999\d\d .* Set FULLRANK_DTYPE=float32", service.failure)
        assert (await client.get("/readyz")).status_code == 503
