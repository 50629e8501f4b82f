"""Ten thousand corrupted images, of every kind, to a real uvicorn: not one is the server's fault, and it keeps none."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from service.settings import Settings
from tests.service.conftest import encoded, pictures
from tests.service.test_service_formats import FILES
from tests.service.test_service_process import free_port, running

WHOLE = [data for data, _ in FILES.values()] + [
    encoded(picture, form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP") for picture in pictures(3, 70, size=64)
]


def corrupted(count: int, seed: int) -> Iterator[bytes]:
    """Real files with bytes changed, cut off, repeated or grafted from another file."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        data = bytearray(WHOLE[i % len(WHOLE)])
        for _ in range(rng.integers(1, 9)):
            at = int(rng.integers(min(len(data), 64) if rng.random() < 0.5 else len(data)))  # headers are the richest
            match rng.integers(4):
                case 0:
                    data[at] = rng.integers(256)
                case 1:
                    del data[at : at + int(rng.integers(1, 16))]
                case 2:
                    data[at:at] = data[: int(rng.integers(1, 64))]
                case 3:
                    other = WHOLE[rng.integers(len(WHOLE))]
                    data[at : at + 16] = other[at : at + 16]
            if not data:
                break
        if rng.random() < 0.2:
            del data[int(rng.integers(1, len(data) + 1)) :]
        yield bytes(data) or b"\0"


def codes(url: str, count: int, seed: int) -> collections.Counter[int]:
    """How often each status came."""
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        return collections.Counter(
            pool.map(lambda data: client.post(url + "/embed", content=data).status_code, corrupted(count, seed))
        )


def resident_bytes(url: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_resident_memory_bytes "))


def test_some_corrupted_images(settings: Callable[..., Settings]) -> None:
    with running(settings(port=free_port())) as (url, _):
        found = codes(url, 300, seed=0)
    assert found.keys() <= {200, 422}
    assert min(found.values()) > 30  # some survive, most do not


@pytest.mark.soak
def test_ten_thousand_corrupted_images(settings: Callable[..., Settings]) -> None:
    # Headers that lie make images of any size: without the limit, what the allocator keeps of them would hide a leak.
    with running(settings(port=free_port(), max_pixels=1_000_000)) as (url, _):
        codes(url, 1000, seed=1)
        before = resident_bytes(url)
        found = codes(url, 10_000, seed=2)
        assert found.keys() <= {200, 422}, found
        assert resident_bytes(url) < 1.1 * before + 2**24  # this process holds the client, too
        assert 'fullrank_requests_total{code="500",route="/embed"} 0.0' in httpx.get(url + "/metrics").text
        assert httpx.post(url + "/embed", content=WHOLE[0]).status_code == 200
