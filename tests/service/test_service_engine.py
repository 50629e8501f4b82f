"""The torch thread: batches, failures, splitting when memory is short."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from service.batching import Pixels, Rows
from service.engine import Engine
from service.metrics import Metrics
from service.observer import Observer

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

    def answered(self, pixels: Pixels, rows: Rows) -> None:
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
    encoder.answered = lambda pixels, rows: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    for value in (1, 2):
        assert (await engine.embed(encoder, images(value))).rows.item() == value
    await engine.close()


async def test_a_monitor_that_refuses_rows_does_not_end_the_observer(metrics: Metrics) -> None:
    observer, seen = Observer(metrics), []

    class Monitor:
        def observe(self, rows: Rows, keys: object, inputs: object) -> None:
            if rows[0, 0] < 0:
                raise ValueError("negative")
            seen.append(rows[0, 0])

    for value in (-1, 5):
        observer.put(Monitor(), np.zeros((1, 1, 8, 8), np.uint8), np.full((1, 2), value, np.float32))  # type: ignore[arg-type]
    observer.close()
    assert seen == [5]
    assert metrics.registry.get_sample_value("fullrank_unobserved_images_total") == 1


async def test_a_batch_too_large_for_memory_is_split(metrics: Metrics) -> None:
    engine, encoder = Engine(8, 1, metrics), Sums(room=3)
    job = await engine.embed(encoder, images(*range(8)))
    assert job.rows[:, 0].tolist() == list(range(8))
    assert encoder.batches == [2, 2, 2, 2]
    await engine.close()


async def test_cancelled_work_is_dropped_before_it_is_computed(metrics: Metrics) -> None:
    engine, encoder = Engine(1, 1, metrics), Sums()
    release = threading.Event()
    blocked = asyncio.create_task(engine.call(release.wait))
    task = asyncio.create_task(engine.embed(encoder, images(5)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    release.set()
    await blocked
    await engine.close()
    assert encoder.batches == []
