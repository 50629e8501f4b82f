"""Images decoded in processes of their own: the same pixels, and no image's time or memory without limit."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from models.decode import ImageError
from models.preprocess import Preprocessing, decode
from service.engine.pool import Pool, SlowImage
from service.engine.queue import Part, Pixels
from tests.support.attacks import repeated_scans
from tests.support.images import encoded, noise

HOW = Preprocessing(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
ENDLESS = repeated_scans(4000, 4000, 40)  # a quarter of a second, at least
LARGE = encoded(noise((64, 64)).resize((4000, 4000)), "PNG", compress_level=1)


@dataclass(eq=False)
class Waiting:
    """A job as far as a pool knows it."""

    anybody: bool = True
    decode_seconds: float = 0.0

    def wanted(self, now: float) -> bool:
        return self.anybody


class Finished:
    """What a pool hands back, to be waited for."""

    def __init__(self) -> None:
        self.results: queue.Queue[tuple[Part, list[Pixels] | Exception]] = queue.Queue()

    def __call__(self, part: Part, result: list[Pixels] | Exception) -> None:
        self.results.put((part, result))

    def next(self) -> list[Pixels] | Exception:
        return self.results.get(timeout=120)[1]


def apart(data: bytes) -> SlowImage:
    return SlowImage(data, HOW, 50_000_000, 16_000_000, lambda error: ValueError(f"{error.code}: {error}"))


def part(count: int, job: Waiting | None = None) -> Part:
    return Part(job or Waiting(), 0, count)  # type: ignore[arg-type]


@pytest.fixture
def finished() -> Finished:
    return Finished()


@pytest.fixture
def pool(finished: Finished) -> Iterator[Pool]:
    pool = Pool(2, 5.0, 2**29, finished)
    yield pool
    pool.close()


def test_pixels_are_those_of_decoding_here_and_decoded_ones_stay(pool: Pool, finished: Finished) -> None:
    files = [encoded(noise((300, 200), seed=seed), form) for seed, form in enumerate(("JPEG", "PNG", "WEBP"))]
    there = np.zeros((3, 32, 32), np.uint8)
    pool.put(part(4), [apart(files[0]), there, *map(apart, files[1:])])
    result = finished.next()
    assert isinstance(result, list)
    assert result[1] is there
    for file, pixels in zip(files, [result[0], *result[2:]], strict=True):
        np.testing.assert_array_equal(pixels, decode(file, HOW))


def test_a_bad_image_fails_its_part_in_its_own_words(pool: Pool, finished: Finished) -> None:
    pool.put(part(2), [apart(encoded(noise((300, 200)), "PNG")[:2000]), apart(encoded(noise(), "PNG"))])
    result = finished.next()
    assert isinstance(result, ValueError)
    assert str(result).startswith("damaged_image: the image is truncated")


@pytest.mark.parametrize(
    ("data", "seconds", "memory", "words"),
    [(ENDLESS, 0.1, 2**29, "too long"), (LARGE, 5.0, 2**24, "too much memory")],
    ids=["time", "memory"],
)
def test_an_image_beyond_its_time_or_memory_is_refused_and_the_next_is_decoded(
    finished: Finished, data: bytes, seconds: float, memory: int, words: str
) -> None:
    killed: list[None] = []
    pool = Pool(1, seconds, memory, finished, lambda: killed.append(None))
    try:
        pool.put(part(1), [apart(data)])
        result = finished.next()
        assert isinstance(result, ValueError)
        assert str(result).startswith("image_too_costly")
        assert words in str(result)
        pool.put(part(1), [apart(encoded(noise(), "PNG"))])
        assert isinstance(finished.next(), list)
        assert killed or words == "too much memory"  # for want of memory a process fails, or an image in it
    finally:
        pool.close()


def test_what_nobody_waits_for_any_more_is_killed_and_the_rest_of_it_dropped(finished: Finished) -> None:
    pool = Pool(1, 600.0, 2**29, finished)
    try:
        job = Waiting()
        pool.put(part(50, job), [apart(ENDLESS)] * 50)
        while not pool._processes:
            assert threading.Event().wait(0.01) is False
        job.anybody = False
        pool.put(part(1), [apart(encoded(noise(), "PNG"))])
        assert isinstance(finished.next(), list)
        assert not pool._tasks
        assert finished.results.empty()
    finally:
        pool.close()


def test_requests_take_turns_image_by_image(finished: Finished) -> None:
    pool = Pool(1, 600.0, 2**29, finished)
    try:
        large, small = part(8), part(1)
        pool.put(large, [apart(encoded(noise((64, 64), seed=seed), "PNG")) for seed in range(8)])
        pool.put(small, [apart(encoded(noise(), "PNG"))])
        assert [finished.results.get(timeout=120)[0] for _ in range(2)] == [small, large]
    finally:
        pool.close()


def test_closing_ends_its_processes_though_they_decode(finished: Finished) -> None:
    pool = Pool(2, 600.0, 2**29, finished)
    pool.put(part(2), [apart(ENDLESS)] * 2)
    while len(pool._processes) < 2:
        assert threading.Event().wait(0.01) is False
    processes = list(pool._processes.values())
    pool.close()
    assert not any(process.running for process in processes)
    assert not any(thread.is_alive() for thread in pool._threads)


def test_an_error_keeps_its_code() -> None:
    assert str(apart(b"").refused(ImageError("a", "b"))) == "a: b"
