"""The torch thread: batches, failures, splitting when memory is short."""

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from service.engine.engine import LANES, Engine
from service.engine.queue import Pixels, Rows
from service.metrics import Metrics

pytestmark = pytest.mark.anyio


class Sums:
    """An encoder whose row is the sum of its image's pixels; notes every batch it is given."""

    def __init__(self, room: int = 1000) -> None:
        self.room, self.batches, self.seen = room, [], []
        self.threads: set[str] = set()

    def embed(self, pixels: Pixels) -> Rows:
        self.threads.add(threading.current_thread().name)
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("no room")
        if pixels.max() == 255:
            raise RuntimeError("bad batch")
        self.batches.append(len(pixels))
        return pixels.reshape(len(pixels), -1).sum(1, keepdims=True, dtype=np.float32)

    def on_embedded(self, pixels: Pixels, rows: Rows, clients: np.ndarray) -> None:
        self.seen.extend(rows[:, 0].tolist())


def images(*values: int) -> Pixels:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 1), np.uint8)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("0", "0", "cpu")


async def test_waiting_jobs_are_embedded_together_and_answered_each_with_its_own(metrics: Metrics) -> None:
    engine, encoder = Engine(4, 1, metrics), Sums()
    jobs = await asyncio.gather(*(engine.embed(encoder, images(i, i + 1)) for i in range(10)))
    assert [job.rows[:, 0].tolist() for job in jobs] == [[i, i + 1] for i in range(10)]
    assert max(encoder.batches) == 4
    assert encoder.threads <= {"engine_0", "engine_1"}
    await engine.close()
    assert sorted(encoder.seen) == sorted(n for i in range(10) for n in (i, i + 1))
    assert metrics.registry.get_sample_value("fullrank_batch_size_sum") == 20


async def test_canary_rows_never_reach_the_monitor(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Sums()
    await asyncio.gather(engine.embed(encoder, images(7), observed=False), engine.embed(encoder, images(8)))
    await engine.close()
    assert encoder.seen == [8]


async def test_a_failing_batch_fails_its_jobs_and_no_other(metrics: Metrics) -> None:
    engine, encoder = Engine(1, 1, metrics), Sums()
    results = await asyncio.gather(
        *(engine.embed(encoder, images(value)) for value in (1, 255, 3)), return_exceptions=True
    )
    assert isinstance(results[1], RuntimeError)
    assert [results[i].rows.item() for i in (0, 2)] == [1, 3]
    await engine.close()


async def test_an_observer_that_fails_stops_nothing(metrics: Metrics) -> None:
    engine, encoder = Engine(1, 1, metrics), Sums()
    encoder.on_embedded = lambda pixels, rows, clients: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    for value in (1, 2):
        assert (await engine.embed(encoder, images(value))).rows.item() == value
    await engine.close()


async def test_a_batch_too_large_for_memory_is_split(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Sums(room=3)
    job = await engine.embed(encoder, images(*range(8)))
    assert job.rows[:, 0].tolist() == list(range(8))
    assert encoder.batches == [2, 2, 2, 2]
    await engine.close()


async def test_cancelled_work_is_dropped_before_it_is_computed(metrics: Metrics) -> None:
    engine, encoder = Engine(1, 1, metrics), Sums()
    entered, release = threading.Event(), threading.Event()

    def block() -> bool:
        entered.set()
        return release.wait(120)

    blocked = asyncio.create_task(engine.call(block))
    await until(entered.is_set)
    task = asyncio.create_task(engine.embed(encoder, images(5)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    release.set()
    await blocked
    await engine.close()
    assert encoder.batches == []


class Files(Sums):
    """An encoder of "files": a number is an image of that value, "bad" is none. Notes decoding and passes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.running, self.entered, self.release = 0, threading.Event(), threading.Event()

    def decode(self, image: int | str) -> Pixels:
        if image == "bad":
            raise ValueError("no image")
        self.events.append(f"decode {image}")
        return images(int(image))[0]

    def embed(self, pixels: Pixels) -> Rows:
        self.running += 1
        assert self.running == 1, "two passes at once"
        self.events.append(f"embed {pixels[:, 0, 0, 0].tolist()}")
        self.entered.set()
        assert self.release.wait(120)
        rows = super().embed(pixels)
        rows[pixels[:, 0, 0, 0] == 99] = np.nan
        self.running -= 1
        return rows


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_next_batch_is_decoded_and_filled_up_while_one_runs(metrics: Metrics) -> None:
    engine, encoder = Engine(3, 1, metrics), Files()
    jobs = [asyncio.create_task(engine.embed(encoder, [1]))]
    await until(encoder.entered.is_set)
    for value in (2, 3, 4, 5):
        jobs.append(asyncio.create_task(engine.embed(encoder, [value])))
        await until(lambda value=value: f"decode {value}" in encoder.events or value == 5)
    await asyncio.sleep(0.02)
    # Three are ready beside the one that runs; a fourth would be a second batch ahead.
    assert encoder.events == ["decode 1", "embed [1]", "decode 2", "decode 3", "decode 4"]
    encoder.release.set()
    assert [job.rows.item() for job in await asyncio.gather(*jobs)] == [1, 2, 3, 4, 5]
    assert [event for event in encoder.events if "embed" in event] == ["embed [1]", "embed [2, 3, 4]", "embed [5]"]
    await engine.close()


async def test_what_nobody_waits_for_is_dropped_even_when_decoded(metrics: Metrics) -> None:
    engine, encoder = Engine(4, 1, metrics), Files()
    first = asyncio.create_task(engine.embed(encoder, [1]))
    await until(encoder.entered.is_set)
    gone, stays = (asyncio.create_task(engine.embed(encoder, [value])) for value in (2, 3))
    await until(lambda: "decode 3" in encoder.events)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    encoder.release.set()
    assert [(await job).rows.item() for job in (first, stays)] == [1, 3]
    assert encoder.events[-1] == "embed [3]"
    await engine.close()


async def test_an_image_that_cannot_be_decoded_fails_its_request_alone(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Files()
    encoder.release.set()
    results = await asyncio.gather(
        *(engine.embed(encoder, list(values)) for values in ([1, 2], [3, "bad"], [4])), return_exceptions=True
    )
    assert isinstance(results[1], ValueError)
    assert [results[i].rows[:, 0].tolist() for i in (0, 2)] == [[1, 2], [4]]
    await engine.close()


async def test_an_embedding_that_is_not_finite_is_its_images_fault_alone(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Files()
    encoder.release.set()
    bad, good = await asyncio.gather(engine.embed(encoder, [5, 99, 6]), engine.embed(encoder, [7, 8]))
    assert (bad.faulty, good.faulty) == (1, None)
    assert good.rows[:, 0].tolist() == [7, 8]
    assert good.unit[:, 0].tolist() == [1, 1]
    await engine.close()


async def test_a_batch_decoded_by_several_threads_keeps_its_order(metrics: Metrics) -> None:
    engine, encoder = Engine(32, 1, metrics, decode_threads=3), Files()
    encoder.release.set()
    jobs = await asyncio.gather(*(engine.embed(encoder, list(range(10 * i, 10 * i + 9))) for i in range(4)))
    assert [job.rows[:, 0].tolist() for job in jobs] == [list(range(10 * i, 10 * i + 9)) for i in range(4)]
    await engine.close()


async def asleep(engine: Engine) -> None:
    """Wait until no lane works."""
    await until(lambda: len(engine._idle) == LANES)


async def test_requests_one_after_another_stay_with_one_lane_whose_caches_are_warm(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Sums()
    for value in range(10):
        await engine.embed(encoder, images(value))
        await asleep(engine)
    assert len(encoder.threads) == 1
    await engine.close()


async def test_one_lane_decodes_nothing_while_it_embeds(metrics: Metrics) -> None:
    engine, encoder = Engine(3, 1, metrics, lanes=1), Files()
    jobs = [asyncio.create_task(engine.embed(encoder, [1]))]
    await until(encoder.entered.is_set)
    jobs += [asyncio.create_task(engine.embed(encoder, [value])) for value in (2, 3, 4)]
    await until(lambda: len(engine.queue) == 3)
    await asyncio.sleep(0.02)
    assert encoder.events == ["decode 1", "embed [1]"]
    encoder.release.set()
    assert [job.rows.item() for job in await asyncio.gather(*jobs)] == [1, 2, 3, 4]
    assert encoder.events[2:] == ["decode 2", "decode 3", "decode 4", "embed [2, 3, 4]"]
    await engine.close()


async def test_a_job_ends_at_its_deadline_though_the_device_is_held(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Files()
    first = asyncio.create_task(engine.embed(encoder, [1]))
    await until(encoder.entered.is_set)
    with pytest.raises(TimeoutError):
        await engine.embed(encoder, [2], time.monotonic() + 0.01)
    encoder.release.set()
    assert (await first).rows.item() == 1
    await engine.close()
    assert encoder.batches == [1]


async def test_other_work_runs_between_two_batches(metrics: Metrics) -> None:
    engine, encoder = Engine(1, 1, metrics), Files()
    job = asyncio.create_task(engine.embed(encoder, [1]))
    await until(encoder.entered.is_set)
    call = asyncio.create_task(engine.call(lambda: encoder.running))
    await asyncio.sleep(0.02)
    assert not call.done()
    encoder.release.set()
    assert await call == 0
    assert (await job).rows.item() == 1
    await engine.close()
