"""Small random encoders on disk, and an app around one, without sockets."""

import asyncio
import base64
import io
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from fullrank import Reference
from models.artifact import Architecture, Artifact, Canary, EncoderCard, Preprocessing, save
from models.backbones.resnet import ResNet
from models.embedder import Embedder, normalize
from service.encoders.registry import Service
from service.encoders.served import Served
from service.http.app import create_app
from service.settings import Settings

SIZE, DIMENSION = 28, 32
Start = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, Service]]]


def pictures(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """(count, size, size) uint8: gratings of random direction, frequency and contrast, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    angle, frequency, phase, contrast = rng.uniform([[0], [1], [0], [20]], [[3.1], [7], [6.3], [120]], (4, count))
    wave = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    signal = 128 + contrast[:, None, None] * np.sin(6.3 * frequency[:, None, None] * wave + phase[:, None, None])
    return (signal + rng.normal(0, 8, signal.shape)).clip(0, 255).astype(np.uint8)


def encoded(picture: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, form)
    return buffer.getvalue()


def as_json(images: list[bytes], **fields: Any) -> dict[str, Any]:
    """The JSON body of POST /embed."""
    return {"images": [base64.b64encode(image).decode() for image in images], **fields}


def as_files(images: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """The multipart parts of POST /embed."""
    return [("images", (f"{i}.png", image)) for i, image in enumerate(images)]


def write_encoder(folder: Path, seed: int, *, dead: int = 0, nan: bool = False) -> Artifact:
    """A random ResNet-18 of width 4; the first `dead` of its dimensions never fire, `nan` makes it overflow."""
    torch.manual_seed(seed)
    architecture = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3")
    encoder: ResNet = architecture.build()
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        # Running statistics of real activations: random filters then spread images about as trained ones do.
        encoder(torch.from_numpy(pictures(256, 3)[:, None]).float() / 63.75 - 2)
        encoder.eval()
        state = encoder.state_dict()
        for name in ("downsample.1", "bn2"):
            state[f"layer4.0.{name}.weight"][:dead] = state[f"layer4.0.{name}.bias"][:dead] = 0
        state["layer4.1.bn2.weight"][:dead] = state["layer4.1.bn2.bias"][:dead] = 0
        if nan:
            state["bn1.weight"].mul_(1e38)
    preprocessing = Preprocessing(size=SIZE, resize="stretch", channels=1, mean=(0.5,), std=(0.25,))
    card = EncoderCard(
        name=folder.name, architecture=architecture, preprocessing=preprocessing, dimension=encoder.dimension
    )
    bare = Artifact(card, encoder)
    if nan:
        return save(bare, folder)
    embedder = Embedder(bare)

    def rows(seed: int, count: int) -> torch.Tensor:
        return normalize(embedder.embed(pictures(count, seed)[:, None]))

    images, canary = torch.from_numpy(pictures(64, 99)[:, None]), rows(99, 64)
    reference = Reference.build(rows(1, 512), rows(2, 512), canary=canary)
    return save(Artifact(card, encoder, reference, Canary(images, canary, "CC0-1.0")), folder)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoders: alpha and beta (healthy), collapsed (one dimension left), broken (not finite)."""
    root = tmp_path_factory.mktemp("encoders")
    torch.set_num_threads(1)
    write_encoder(root / "alpha", 2)
    write_encoder(root / "beta", 3)
    write_encoder(root / "collapsed", 1, dead=DIMENSION - 1)
    write_encoder(root / "broken", 4, nan=True)
    return root


@pytest.fixture(scope="session")
def settings(encoders: Path) -> Callable[..., Settings]:
    """Settings around alpha, with changes."""

    def make(**changes: Any) -> Settings:
        # Each image watched, so that tests can count them.
        always: dict[str, Any] = {"threads": 1, "monitor_rate": math.inf}
        defaults: dict[str, Any] = {"encoder": encoders / "alpha", "encoders_dir": encoders, **always}
        return Settings(**(defaults | changes))

    return make


@pytest.fixture(scope="session")
def start(settings: Callable[..., Settings]) -> Start:
    """`async with start(**settings) as (client, service)`: a ready app over ASGI, no sockets."""

    @asynccontextmanager
    async def run(*, address: str = "127.0.0.1", **changes: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
        app = create_app(settings(**changes))
        service: Service = app.state.service
        transport = httpx.ASGITransport(app, client=(address, 1234))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client,
        ):
            while service.phase == "starting" and service.failure is None:
                await asyncio.sleep(0.005)
            yield client, service

    return run


@pytest.fixture(scope="session")
async def shared(start: Start) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """One app for all tests that leave it as it was."""
    async with start() as both:
        yield both


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


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
