"""POST /embed: every form in and out gives exactly what models.embedder gives."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models import artifact
from models.embedder import Embedder, normalize
from models.preprocess import decode
from service.encoders.registry import Service
from service.settings import Settings
from tests.support.app import Start
from tests.support.images import DIMENSION, as_files, as_json, encoded, pictures

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """PNG, JPEG, WebP and BMP files, grey and of other sizes than the encoder's."""
    small, large = pictures(3, seed=5), pictures(3, seed=6, size=90)
    return [encoded(p, "PNG") for p in small] + [
        encoded(p, f) for p, f in zip(large, ("JPEG", "WEBP", "BMP"), strict=True)
    ]


@pytest.fixture
def expected(settings: Callable[..., Settings], images: list[bytes]) -> NDArray[np.float32]:
    """(6, d) rows by the offline path."""
    loaded = artifact.load(settings().encoder)
    pixels = np.stack([decode(image, loaded.card.preprocessing) for image in images])
    return Embedder(loaded).embed(pixels).numpy()


@pytest.fixture(scope="module")
async def served(start: Start) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    async with start(max_batch=4) as both:
        yield both


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return normalize(torch.from_numpy(rows)).numpy()


def rows_of(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    media = response.headers["content-type"]
    if media == "application/x-npy":
        return np.load(io.BytesIO(response.content))
    if media == "application/octet-stream":
        shape = tuple(map(int, response.headers["x-shape"].split(",")))
        return np.frombuffer(response.content, "<f4").reshape(shape)
    embeddings = response.json()["embeddings"]
    if isinstance(embeddings[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in embeddings])
    return np.array(embeddings, np.float32)


async def test_one_image_as_the_body(
    served: tuple[httpx.AsyncClient, Service], images: list[bytes], expected: NDArray[np.float32]
) -> None:
    client, service = served
    for media in ("image/png", "image/anything", "application/octet-stream", "IMAGE/PNG; x=y"):
        response = await client.post("/embed", content=images[0], headers={"content-type": media})
        np.testing.assert_allclose(rows_of(response), unit(expected[:1]), atol=1e-6)
    body = response.json()
    assert (body["model"], body["revision"]) == (service.current.name, service.current.revision)
    assert body["dimension"] == DIMENSION
    assert response.headers["x-revision"] == service.current.revision
    assert "forward;dur=" in response.headers["server-timing"]


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/x-npy", "application/octet-stream"])
@pytest.mark.parametrize("form", ["multipart", "json", "data-uri"])
@pytest.mark.parametrize("normalized", [True, False])
async def test_every_form_in_and_out(
    served: tuple[httpx.AsyncClient, Service],
    images: list[bytes],
    expected: NDArray[np.float32],
    accept: str,
    form: str,
    normalized: bool,
) -> None:
    flag = {} if normalized else {"normalize": False}
    sent: dict[str, Any] = {"json": as_json(images, **flag)}
    if form == "multipart":
        sent = {"files": as_files(images), "data": {key: str(value).lower() for key, value in flag.items()}}
    elif form == "data-uri":
        sent["json"]["images"] = ["data:image/png;base64," + text for text in sent["json"]["images"]]
    client, _ = served
    response = await client.post("/embed", headers={"accept": accept}, **sent)
    np.testing.assert_allclose(rows_of(response), unit(expected) if normalized else expected, rtol=1e-4, atol=1e-6)


async def test_base64_rows_are_little_endian_float32(
    served: tuple[httpx.AsyncClient, Service], images: list[bytes], expected: NDArray[np.float32]
) -> None:
    client, _ = served
    by_field = await client.post("/embed", json=as_json(images, encoding_format="base64"))
    by_query = await client.post("/embed?encoding_format=base64&normalize=false", files=as_files(images))
    assert isinstance(by_field.json()["embeddings"][0], str)
    np.testing.assert_allclose(rows_of(by_field), unit(expected), atol=1e-6)
    np.testing.assert_allclose(rows_of(by_query), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("application/x-npy;q=0.2, application/octet-stream;q=0.9", "application/octet-stream"),
        ("text/html, application/*;q=0.5", "application/json"),
        ("", "application/json"),
    ],
)
async def test_accept_is_honoured(
    served: tuple[httpx.AsyncClient, Service], images: list[bytes], accept: str, media: str
) -> None:
    client, _ = served
    response = await client.post("/embed", content=images[0], headers={"accept": accept, "content-type": "image/png"})
    assert response.headers["content-type"] == media


async def test_concurrent_requests_are_batched_and_answered_each_with_its_own(
    served: tuple[httpx.AsyncClient, Service], images: list[bytes], expected: NDArray[np.float32]
) -> None:
    client, service = served
    sample = service.metrics.registry.get_sample_value
    images_before, batches_before = sample("fullrank_images_total"), sample("fullrank_batches_total")
    answers = await asyncio.gather(
        *(client.post("/embed", files=as_files(images[i % 3 : 6])) for i in range(12)),
        *(client.post("/embed", content=images[i], headers={"content-type": "image/png"}) for i in range(6)),
    )
    for i, answer in enumerate(answers):
        wanted = expected[i % 3 :] if i < 12 else expected[i - 12 : i - 11]
        np.testing.assert_allclose(rows_of(answer), unit(wanted), atol=2e-6)
    images_after, batches_after = sample("fullrank_images_total"), sample("fullrank_batches_total")
    assert images_after - images_before == 4 * (6 + 5 + 4) + 6
    assert batches_after - batches_before < (images_after - images_before) / 2
    assert service.admission.pending == 0
