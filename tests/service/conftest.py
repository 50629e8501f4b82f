"""A folder of small random encoders, and an app around one of them, without sockets."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.encoders.registry import Service
from service.http.app import create_app
from service.settings import Settings
from tests.support.app import Start
from tests.support.encoders import write_encoder
from tests.support.images import DIMENSION


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoders: alpha and beta (healthy), collapsed (two units left), broken (not finite)."""
    root = tmp_path_factory.mktemp("encoders")
    torch.set_num_threads(1)
    write_encoder(root / "alpha", 2)
    write_encoder(root / "beta", 3)
    write_encoder(root / "collapsed", 5, dead=DIMENSION - 2)
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


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
