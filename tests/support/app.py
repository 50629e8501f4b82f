"""What tests ask of an app without sockets: hold its forward passes, wait for its queue, read its errors."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import httpx
import numpy as np

from service.encoders.registry import Service
from service.encoders.served import Served
from service.engine.queue import Pixels, Rows

Start = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, Service]]]

Embed = Callable[[Pixels], Rows]


def handed_to_the_next(served: Served, honest: Embed) -> Embed:
    """Each request gets the answer of the one before, the first a row of ones."""
    last = np.ones((1, served.artifact.card.dimension), np.float32)

    def embed(pixels: Pixels) -> Rows:
        nonlocal last
        rows = np.concatenate((last, honest(pixels)))
        last = rows[-1:]
        return rows[:-1]

    return embed


class Hold:
    """A forward pass held up: `entered` is set when one waits, `release` lets it and all later ones go on."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()


@contextmanager
def held(served: Served) -> Iterator[Hold]:
    """Hold every forward pass of an encoder until released, or the block ends."""
    hold, embed = Hold(), served.embed

    def wait_then_embed(pixels: np.ndarray) -> np.ndarray:
        hold.entered.set()
        assert hold.release.wait(120)
        return embed(pixels)

    served.embed = wait_then_embed  # type: ignore[method-assign]
    try:
        yield hold
    finally:
        hold.release.set()
        served.embed = embed  # type: ignore[method-assign]


async def pending(service: Service, images: int) -> None:
    """Wait until so many images are pending."""
    async with asyncio.timeout(120):
        while service.admission.pending != images:
            await asyncio.sleep(0.002)


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a response, which must have this status and code and the one shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "field"}
    assert body["error"]["code"] == code, body
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error
