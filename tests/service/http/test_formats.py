"""Every kind of image file that cameras, browsers and scanners make, by /embed: the pixels that a viewer would show."""

import httpx
import numpy as np
import pytest

from service.encoders.registry import Service
from tests.support.image_files import FILES, GREY, OTHER, REFUSED
from tests.support.images import encoded

pytestmark = pytest.mark.anyio


async def row(client: httpx.AsyncClient, image: bytes) -> np.ndarray:
    response = await client.post("/embed", content=image)
    assert response.status_code == 200, response.text
    return np.array(response.json()["embeddings"][0])


@pytest.mark.parametrize("kind", FILES)
async def test_what_the_file_shows_is_what_is_embedded(shared: tuple[httpx.AsyncClient, Service], kind: str) -> None:
    data, tolerance = FILES[kind]
    plain, other = [await row(shared[0], encoded(image)) for image in (GREY, OTHER)]
    assert plain @ other < 0.9  # so that closeness means something
    assert await row(shared[0], data) @ plain == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("kind", REFUSED)
async def test_formats_with_a_history_of_holes_are_refused(
    shared: tuple[httpx.AsyncClient, Service], kind: str
) -> None:
    response = await shared[0].post("/embed", content=REFUSED[kind])
    assert (response.status_code, response.json()["error"]["code"]) == (422, "not_an_image")
    assert "JPEG, PNG, WEBP, GIF, BMP" in response.json()["error"]["message"]
