"""The canary's trickle: what it finds, what it costs, whom it lets pass."""

import asyncio
import time

import numpy as np
import pytest

from service.encoders.registry import Service
from service.engine.queue import Job, Pixels, Queue
from service.watching.canary import SECONDS_TOGETHER, SHARE, CanaryWatch, embed_in_turns
from tests.support.app import Start, held
from tests.support.images import pictures

pytestmark = pytest.mark.anyio
FINITE, NONFINITE, FAILED = (
    ("fullrank_canary_images_total", {"result": result}) for result in ("finite", "nonfinite", "failed")
)


def watch_of(service: Service) -> CanaryWatch:
    """The watch that the default encoder's trickle runs."""
    coroutine = service.roster._trickles[service.current].get_coro()
    watch: CanaryWatch = coroutine.cr_frame.f_locals["self"]  # type: ignore[union-attr]
    return watch


def job(encoder: object, images: int, yields_for: float = 0.0) -> Job:
    pixels = np.zeros((images, 1, 8, 8), np.uint8)
    answer = asyncio.get_running_loop().create_future()
    return Job(encoder, pixels, float("inf"), answer, yields_until=time.monotonic() + yields_for)


def sizes(queue: Queue) -> list[int]:
    return [part.stop - part.start for part in queue.take()]


async def test_canary_images_fill_room_in_batches_of_many_or_an_idle_engine() -> None:
    queue, encoder = Queue(32), object()

    def canary_and(*requests: int) -> list[list[int]]:
        queue.put(job(encoder, 4, yields_for=60))
        for images in requests:
            queue.put(job(encoder, images))
        batches = []
        while batch := sizes(queue):
            batches.append(batch)
        return batches

    assert canary_and() == [[4]]
    assert canary_and(24) == [[24, 3], [1]]  # an eighth of what it rides with
    assert canary_and(1) == [[1], [4]]  # never in a batch that it would make twice as long
    assert canary_and(32) == [[32], [4]]
    assert canary_and(30) == [[30, 2], [2]]
    assert canary_and(64) == [[32], [32], [4]]


async def test_a_canary_that_yielded_long_enough_gets_its_share_of_a_full_engine() -> None:
    queue, encoder = Queue(8), object()
    queue.put(job(encoder, 2, yields_for=0))
    queue.put(job(encoder, 64))
    assert sizes(queue) == [2, 6]


async def test_another_encoders_canary_waits() -> None:
    queue = Queue(32)
    queue.put(job("old", 4, yields_for=60))
    queue.put(job("new", 16))
    assert [(part.job.encoder, part.stop) for part in queue.take()] == [("new", 16)]
    assert [(part.job.encoder, part.stop) for part in queue.take()] == [("old", 4)]


async def test_a_saturated_engine_spends_no_more_than_the_share_on_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.watching.canary.SHARE", 10 * SHARE)  # so that a cycle ends sooner
    async with start(canary_period=1e-3, max_batch=32) as (_, service):
        watch = watch_of(service)
        assert watch.cycle > 1e-3  # the share sets the pace
        count = service.metrics.registry.get_sample_value
        assert service.current.artifact.canary is not None
        images, batch = len(service.current.artifact.canary.images), pictures(32, 5)[:, None]
        before, started, canary = count(*FINITE) or 0, time.monotonic(), 0.0
        async with asyncio.timeout(120):
            while canary < 2 * watch.few:
                await asyncio.gather(*(service.engine.embed(service.current, batch) for _ in range(4)))
                canary = (count(*FINITE) or 0) - before
        # However slow the machine has become, each few wait for their share of a cycle.
        assert canary <= images * (time.monotonic() - started) / watch.cycle + 2 * watch.few


async def test_images_that_are_late_are_said_to_be(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    async with start(canary_period=600) as (_, service):
        watch = watch_of(service)
        watch._period = 0.0
        with held(service.current):
            assert not await watch._embed(service.engine, service.current, slice(0, 1), 0.0)
    assert "canary images could not be embedded: TimeoutError" in caplog.text


async def test_the_pace_follows_from_what_an_image_costs(start: Start) -> None:
    async with start(canary_period=0.5) as (_, service):
        artifact = service.current.artifact
        assert artifact.canary is not None

        class Slow:
            def embed(self, pixels: Pixels) -> np.ndarray:
                time.sleep(0.002 * len(pixels))
                return np.ones((len(pixels), 32), np.float32)

            def on_embedded(self, pixels: Pixels, rows: np.ndarray, clients: np.ndarray) -> None: ...

        pixels = artifact.canary.images.numpy()
        rows, seconds = await embed_in_turns(service.engine, Slow(), pixels)
        assert rows.shape == (len(pixels), 32)
        watch = CanaryWatch(artifact.canary, rows, seconds, service.metrics, 0.5, 8.0)
        least = 0.002 * len(artifact.canary.images)
        assert watch.cycle >= least / SHARE
        assert 1 <= watch.few <= SECONDS_TOGETHER / 0.002


async def test_a_fault_shows_at_the_first_image_and_is_gone_a_cycle_after_it_ends(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.watching.canary.SHARE", 1.0)
    async with start(canary_period=0.5) as (_, service):
        served = service.current
        assert served.monitor is not None
        honest = served.embed

        async def until(state: str) -> None:
            async with asyncio.timeout(120):
                while served.monitor.snapshot().verdict.state != state:
                    await asyncio.sleep(0.01)

        served.embed = lambda pixels: honest(255 - pixels)  # type: ignore[method-assign]
        await until("model_fault")
        served.embed = honest  # type: ignore[method-assign]
        await until("insufficient_data")
        served.embed = lambda pixels: honest(pixels) * np.nan  # type: ignore[method-assign]
        await until("model_fault")
        assert (service.metrics.registry.get_sample_value(*NONFINITE) or 0) > 0


async def test_a_swap_ends_the_old_encoders_trickle_and_starts_the_new_ones(start: Start) -> None:
    async with start(canary_period=0.05) as (client, service):
        old = service.roster._trickles[service.current]
        assert (await client.post("/admin/encoders", json={"name": "beta"})).status_code == 200
        async with asyncio.timeout(120):
            while not old.done():
                await asyncio.sleep(0.01)
        (new,) = service.roster._trickles.values()
        assert not new.done()


async def test_a_failing_forward_pass_does_not_end_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.watching.canary.SHARE", 1.0)
    async with start(canary_period=0.01) as (_, service):
        served = service.current
        honest, calls = served.embed, 0

        def fail_once(pixels: Pixels) -> np.ndarray:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("no")
            return honest(pixels)

        served.embed = fail_once  # type: ignore[method-assign]
        async with asyncio.timeout(120):
            while calls < 3:
                await asyncio.sleep(0.01)
        assert not service.roster._trickles[served].done()
        assert (service.metrics.registry.get_sample_value(*FAILED) or 0) > 0


async def test_images_that_cannot_be_embedded_for_a_period_are_a_fault(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.watching.canary.SHARE", 1.0)
    async with start(canary_period=0.2) as (client, service):
        served = service.current
        assert served.monitor is not None
        honest = served.embed

        def fail(pixels: Pixels) -> np.ndarray:
            raise RuntimeError("no")

        async def until(state: str) -> None:
            async with asyncio.timeout(120):
                while served.monitor.snapshot().verdict.state != state:
                    await asyncio.sleep(0.01)

        served.embed = fail  # type: ignore[method-assign]
        await until("model_fault")
        assert (await client.get("/readyz")).status_code == 503
        served.embed = honest  # type: ignore[method-assign]
        await until("insufficient_data")
        assert (await client.get("/readyz")).status_code == 200
