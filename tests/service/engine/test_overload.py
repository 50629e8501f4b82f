"""Full, late or deserted: what is refused, what is dropped, and that nothing leaks."""

import asyncio
from typing import Any

import httpx
import pytest

from service.encoders.registry import Service
from tests.support.app import Start, error_of, held, pending
from tests.support.images import as_files, encoded, pictures

pytestmark = pytest.mark.anyio
IMAGES = [encoded(picture) for picture in pictures(8)]


def post(client: httpx.AsyncClient, images: int, **more: Any) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(client.post("/embed", files=as_files(IMAGES[:images]), **more))


def rejected(service: Service, reason: str) -> float | None:
    return service.metrics.registry.get_sample_value("fullrank_rejected_images_total", {"reason": reason})


async def test_a_full_service_says_429_with_retry_after_and_answers_what_it_took(start: Start) -> None:
    async with start(max_pending_images=8, max_images_per_request=8) as (client, service):
        with held(service.current) as hold:
            first = post(client, 6)
            await pending(service, 6)
            refused = await post(client, 3)
            error = error_of(refused, 429, "overloaded")
            assert "8" in error["message"]
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            second = post(client, 2)
            await pending(service, 8)
            metrics = await client.get("/metrics")
            assert "fullrank_pending_images 8.0" in metrics.text
            assert (await client.get("/readyz")).status_code == 200
            hold.release.set()
            assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert rejected(service, "overloaded") == 3
        assert service.admission.pending == 0
        assert (await post(client, 8)).status_code == 200


async def test_past_its_deadline_work_is_dropped_before_it_is_computed(start: Start) -> None:
    async with start() as (client, service):
        with held(service.current) as hold:
            running = post(client, 1)
            assert await asyncio.to_thread(hold.entered.wait, 120)
            late = await post(client, 2, headers={"x-request-timeout": "0.5"})
            error_of(late, 408, "client_deadline")
            hold.release.set()
            assert (await running).status_code == 200
        assert service.admission.pending == 0
        assert rejected(service, "client_deadline") == 2
        assert rejected(service, "deadline") == 0
        assert (await post(client, 1)).status_code == 200
        await service.engine.call(int)
        # The late images were never in a batch: 1 + 1 were.
        assert service.metrics.registry.get_sample_value("fullrank_batch_size_sum") == 2


async def test_past_the_services_own_deadline_it_is_the_services_fault(start: Start) -> None:
    async with start(request_timeout=0.5) as (client, service):
        with held(service.current) as hold:
            first = post(client, 1)
            assert await asyncio.to_thread(hold.entered.wait, 120)
            error_of(await post(client, 2, headers={"x-request-timeout": "60"}), 504, "deadline_exceeded")
            hold.release.set()
            await first
        assert rejected(service, "deadline") >= 2
        assert rejected(service, "client_deadline") == 0


async def test_a_slow_body_is_408(start: Start) -> None:
    async def slowly() -> Any:
        yield b"x"
        await asyncio.sleep(5)
        yield b"x"

    async with start() as (client, _):
        headers = {"content-type": "image/png", "x-request-timeout": "0.05"}
        error_of(await client.post("/embed", content=slowly(), headers=headers), 408, "body_timeout")


async def test_while_starting_it_is_503_and_alive(settings: Any) -> None:
    from service.http.app import create_app

    app = create_app(settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/healthz")).status_code == 200
        for path in ("/readyz", "/info", "/spectrum"):
            response = await client.get(path)
            error_of(response, 503, "starting")
            assert response.headers["retry-after"] == "1"
        error_of(await client.post("/embed", files=as_files(IMAGES[:3])), 503, "starting")
        assert rejected(app.state.service, "unready") == 3
        assert (await client.get("/metrics")).status_code == 200


async def test_a_damaged_encoder_never_gets_ready(start: Start, tmp_path: Any, encoders: Any) -> None:
    for file in (encoders / "alpha").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    async with start(encoder=tmp_path) as (client, _):
        error = error_of(await client.get("/readyz"), 503, "failed")
        assert "encoder.safetensors" in error["message"]
        assert "changed or damaged" in error["message"]


async def test_a_failed_canary_keeps_it_unready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.embedder import Embedder

    honest = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, pixels: honest(self, 255 - pixels))
    async with start() as (client, _):
        error = error_of(await client.get("/readyz"), 503, "failed")
        assert "canary" in error["message"]
