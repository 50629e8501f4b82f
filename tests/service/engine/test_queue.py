"""Batches, fairness, deadlines and admission, without torch or HTTP."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from service.engine import queue as batching
from service.engine.queue import Admission, Job, OverloadError, Queue

pytestmark = pytest.mark.anyio
ONE = np.ones((1, 1), np.float32)


def job(images: int, encoder: object = "a", deadline: float = math.inf) -> Job:
    future = asyncio.get_running_loop().create_future()
    return Job(encoder, np.zeros((images, 1, 8, 8), np.uint8), deadline, future)


def sizes(queue: Queue) -> list[tuple[Job, int]]:
    return [(part.job, part.stop - part.start) for part in queue.take()]


async def test_batches_fill_up_and_keep_order() -> None:
    queue, jobs = Queue(8), [job(3) for _ in range(4)]
    for it in jobs:
        queue.put(it)
    taken = [part for _ in range(3) for part in queue.take()]
    assert sum(part.stop - part.start for part in taken) == 12
    assert queue.take() == []
    for it in jobs:
        spans = sorted((part.start, part.stop) for part in taken if part.job is it)
        assert spans[0][0] == 0
        assert spans[-1][1] == 3
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


async def test_every_batch_is_full_while_images_wait() -> None:
    queue = Queue(32)
    for images in (256, 1, 5, 100):
        queue.put(job(images))
    batches = list(iter(lambda: sum(n for _, n in sizes(queue)), 0))
    assert batches == [32] * 11 + [10]


async def test_a_large_job_does_not_starve_a_small_one() -> None:
    queue, large, small = Queue(32), job(256), job(4)
    queue.put(large)
    queue.take()
    queue.put(small)
    assert sorted(n for _, n in sizes(queue)) == [4, 28]


async def test_many_small_jobs_do_not_starve_a_large_one() -> None:
    queue, large = Queue(8), job(64)
    queue.put(large)
    for _ in range(12):
        for _ in range(8):
            queue.put(job(1))
        queue.take()
    assert large.taken >= 8


async def test_a_batch_holds_one_encoder_only() -> None:
    queue = Queue(8)
    for encoder in "abab":
        queue.put(job(2, encoder))
    assert [[(it.encoder, n) for it, n in sizes(queue)] for _ in range(3)] == [
        [("a", 2), ("a", 2)],
        [("b", 2), ("b", 2)],
        [],
    ]


async def test_abandoned_and_late_jobs_are_never_taken() -> None:
    queue, gone, late, good = Queue(8), job(2), job(2, deadline=0.0), job(2)
    for it in (gone, late, good):
        queue.put(it)
    gone.abandoned = True
    assert [it for it, _ in sizes(queue)] == [good]


async def test_rows_come_back_in_order_whatever_the_batches() -> None:
    queue, it = Queue(4), job(10)
    queue.put(it)
    value = itertools.count()
    done = [
        it.store(part, np.array([[next(value)] for _ in range(part.start, part.stop)], np.float32), ONE, 0.0, 1.0)
        for _ in range(3)
        for part in queue.take()
    ]
    assert done == [False, False, True]
    assert it.rows[:, 0].tolist() == list(range(10))
    assert it.forward_seconds == 3.0


def test_admission_is_counted_per_image_and_given_back() -> None:
    admission = Admission(10)
    admission.enter(8)
    assert admission.pending == 8
    with pytest.raises(OverloadError) as caught:
        admission.enter(3)
    assert (caught.value.pending, caught.value.limit) == (8, 10)
    admission.enter(2)
    assert admission.pending == 10
    admission.leave(8)
    admission.leave(2)
    assert admission.pending == 0


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(batching.time, "monotonic", lambda: now)
    admission = Admission(100)
    assert admission.retry_after(200) == 1  # nothing measured yet
    admission.enter(20)
    now = 2.0  # ten images a second
    admission.leave(20)
    now = 500.0  # an idle service drains no slower for it
    admission.enter(100)
    assert admission.retry_after(1) == 1
    assert admission.retry_after(75) == 8
    now = 5000.0
    assert admission.retry_after(100) == 60


def test_refusals_leave_at_a_bounded_rate_and_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(batching.time, "monotonic", lambda: now)
    admission = Admission(1)
    assert [admission.hold() for _ in range(4)] == pytest.approx([0.0, 0.005, 0.010, 0.015])
    assert max(admission.hold() for _ in range(1000)) == pytest.approx(1.0)
    now = 100.5
    assert admission.hold() == pytest.approx(0.505)
    now = 200.0
    assert admission.hold() == 0.0
