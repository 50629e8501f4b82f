"""What a replica that cannot do its work says of itself, and that it ends when asked to."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.encoders import health
from service.encoders.registry import Service
from service.engine.queue import Pixels, Rows
from service.settings import Settings
from tests.support.app import Start, error_of, held
from tests.support.images import as_files, encoded, pictures
from tests.support.process import ready, running, until
from tools.stack import free_port

pytestmark = pytest.mark.anyio
FILES = as_files([encoded(pictures(1)[0])])


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK", 0.01)
    monkeypatch.setattr(health, "PROBE", 0.02)


def count(service: Service, name: str) -> float:
    return service.metrics.registry.get_sample_value(f"fullrank_{name}") or 0.0


async def status(client: httpx.AsyncClient, path: str, wanted: int) -> httpx.Response:
    """Ask until it answers with this status."""
    async with asyncio.timeout(120):
        while (response := await client.get(path)).status_code != wanted:
            await asyncio.sleep(0.01)
    return response


@contextmanager
def embedding(service: Service, embed: Callable[[Pixels], Rows]) -> Iterator[None]:
    """Another forward pass in place of the encoder's."""
    served = service.current
    honest, served.embed = served.embed, embed  # type: ignore[method-assign]
    try:
        yield
    finally:
        served.embed = honest  # type: ignore[method-assign]


async def test_a_replica_whose_every_pass_fails_is_unready_until_one_succeeds(start: Start) -> None:
    async with start(canary_period=600, liveness_seconds=0.1) as (client, service):

        def fail(pixels: Pixels) -> Rows:
            raise RuntimeError("the device is gone")

        with embedding(service, fail):
            for _ in range(health.FAILURES):
                assert (await client.post("/embed", files=FILES)).status_code == 500
            error = error_of(await status(client, "/readyz", 503), 503, "unfit")
            assert "forward passes failed" in error["message"]
            error_of(await status(client, "/healthz", 503), 503, "stuck")
            assert count(service, "unfit") == 1
            assert count(service, "failed_batches_total") >= health.FAILURES
        # Nobody sends requests to an unready replica: it finds out by itself.
        await status(client, "/readyz", 200)
        await status(client, "/healthz", 200)
        assert count(service, "unfit") == 0


async def test_one_pass_that_succeeds_between_failures_keeps_it_ready(start: Start) -> None:
    async with start(canary_period=600) as (client, service):
        honest, calls = service.current.embed, 0

        def every_other(pixels: Pixels) -> Rows:
            nonlocal calls
            calls += 1
            if calls % 2:
                raise RuntimeError("now and then")
            return honest(pixels)

        with embedding(service, every_other):
            codes = [(await client.post("/embed", files=FILES)).status_code for _ in range(8)]
            assert codes == [500, 200] * 4
            assert (await client.get("/readyz")).status_code == 200


async def test_a_pass_that_never_ends_makes_it_unready_and_then_not_alive(start: Start) -> None:
    async with start(request_timeout=0.2, liveness_seconds=0.1) as (client, service):
        with held(service.current):
            error_of(await client.post("/embed", files=FILES), 504, "deadline_exceeded")
            assert "none of it ends" in error_of(await status(client, "/readyz", 503), 503, "unfit")["message"]
            error_of(await status(client, "/healthz", 503), 503, "stuck")
            assert count(service, "stalled_seconds") > 0.2
        await status(client, "/readyz", 200)
        assert count(service, "stalled_seconds") == 0


async def test_a_replica_whose_lanes_ended_says_so_at_once_and_is_not_alive_soon(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    async with start(canary_period=600, request_timeout=0.5, liveness_seconds=0.1) as (client, service):

        def end(pixels: Pixels) -> Rows:
            raise SystemExit

        with embedding(service, end):
            for _ in range(2):
                await client.post("/embed", files=FILES)
        error = error_of(await status(client, "/readyz", 503), 503, "unfit")
        assert "engine_0, engine_1 ended" in error["message"]
        error_of(await status(client, "/healthz", 503), 503, "stuck")
        assert count(service, "dead_threads") == 2


async def test_a_monitor_whose_thread_ended_is_counted_and_requests_are_answered(start: Start) -> None:
    async with start() as (client, service):
        monitor = service.current.monitor
        assert monitor is not None
        assert count(service, "dead_threads") == 0
        monitor.close()
        assert count(service, "dead_threads") == 1
        assert (await client.post("/embed", files=FILES)).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_a_zero_row_is_no_embedding(start: Start) -> None:
    async with start(canary_period=600) as (client, service):
        with embedding(service, lambda pixels: np.zeros((len(pixels), 32), np.float32)):
            error = error_of(await client.post("/embed", files=FILES), 500, "nonfinite_embedding")
            assert "all zero" in error["message"]
        rejected = service.metrics.registry.get_sample_value("fullrank_rejected_images_total", {"reason": "nonfinite"})
        assert rejected == 1


async def test_rows_whose_squares_overflow_are_normalised(start: Start) -> None:
    async with start(canary_period=600) as (client, service):
        honest = service.current.embed
        wanted = np.array((await client.post("/embed", files=FILES)).json()["embeddings"])
        for scale in (1e30, 1e-30):
            with embedding(service, lambda pixels, scale=scale: honest(pixels) * np.float32(scale)):  # type: ignore[misc]
                got = np.array((await client.post("/embed", files=FILES)).json()["embeddings"])
            np.testing.assert_allclose(got, wanted, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_sigterm_ends_it_though_a_pass_never_does(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("service.engine.engine.ENDING", 0.2)
    with (
        running(settings(request_timeout=1, state_dir=tmp_path)) as (url, server),
        held(server.service.current) as hold,
    ):
        assert httpx.post(url + "/embed", files=FILES, timeout=120).status_code == 504
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: not server.started or server.service.phase == "stopped")
        until(lambda: server.service.store._folder is None)  # the last thing that closing does
        assert not hold.release.is_set()


STUCK = """
import threading
from service.encoders.served import Candidate
from service.http.app import serve
from service.settings import Settings

honest = Candidate.embed

def embed(served, pixels):
    if pixels.max() == 77:
        print("stuck", flush=True)
        threading.Event().wait()
    return honest(served, pixels)

Candidate.embed = embed
serve(Settings())
"""


def test_the_process_ends_at_sigterm_though_a_pass_never_does(encoders: Path) -> None:
    port = free_port()
    values = {"PORT": port, "ENCODER": encoders / "alpha", "REQUEST_TIMEOUT": 2, "THREADS": 1, "CANARY_PERIOD": 600}
    environment = os.environ | {f"FULLRANK_{name}": str(value) for name, value in values.items()}
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: ready(url))
            image = encoded(np.full((28, 28), 77, np.uint8))
            with pytest.raises(httpx.HTTPError):
                httpx.post(url + "/embed", files=as_files([image]), timeout=0.5)
            assert process.stdout is not None
            assert process.stdout.readline() == b"stuck\n"
            process.terminate()
            assert process.wait(120) in (0, -signal.SIGTERM)  # uvicorn raises it again, at its end
        finally:
            process.kill()
