"""A replica in a process of its own, abused: too much load, slow clients, kills, damaged encoders, hours of requests.

The long ones are `soak`; each has a short version beside it. `-s` shows the figures. No time is asserted: the machine
may be busy with anything.
"""

import asyncio
import collections
import contextlib
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from models import artifact
from tests.support.app import error_of
from tests.support.images import encoded, pictures
from tests.support.process import Replica, get, replica, until

PNG = encoded(pictures(1)[0])
BMP = encoded(pictures(1)[0], "BMP")
PIXELS = len(BMP) - 28 * 28  # where an uncompressed grey BMP's pixels begin


def request(body: bytes, kind: str = "image/png", *headers: str) -> bytes:
    lines = ["POST /embed HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Accept: application/octet-stream", *headers, "", ""]).encode() + body


def multipart(images: int) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n' + PNG + b"\r\n"
    return request(part * images + b"--b--\r\n", "multipart/form-data; boundary=b")


def connect(url: str) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))


@dataclass
class Load:
    """What closed-loop clients saw."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)  # of those answered 200
    lost: int = 0  # sent on a connection that was not closing, and never answered

    async def client(self, url: str, make: Callable[[], bytes], until: Callable[[], bool]) -> None:
        """Send one request after another on one connection until told to stop or that it closes."""
        reader, writer = await connect(url)
        try:
            while not until():
                started = time.monotonic()
                writer.write(make())
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
                await reader.readexactly(length)
                status = int(head.split(b" ", 2)[1])
                self.statuses[status] += 1
                assert status != 429 or b"retry-after" in head.lower()
                if status == 200:
                    self.seconds.append(time.monotonic() - started)
                if b"connection: close" in lines:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()

    async def clients(self, number: int, url: str, make: Callable[[], bytes], until: Callable[[], bool]) -> None:
        await asyncio.gather(*(self.client(url, make, until) for _ in range(number)))

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))


def overload(encoders: Path, seconds: float) -> None:
    """Two connections keep it busy; twenty, ten times the load, get answers or a 429, and it never holds more."""
    body, limit = multipart(16), 64
    limits = {"max_pending_images": limit, "max_images_per_request": 32, "max_batch": 8}
    with replica(encoder=encoders / "alpha", **limits) as it:
        pending: list[float] = []

        async def watched(connections: int, seconds: float, statuses: set[int]) -> Load:
            """Load for some seconds, until it was seen and several requests were answered in each of these ways."""
            load, end = Load(), time.monotonic() + seconds
            pending.clear()

            async def watch() -> None:
                while True:
                    pending.append(await asyncio.to_thread(it.metric, "fullrank_pending_images"))
                    await asyncio.sleep(0.1)

            watching = asyncio.create_task(watch())

            def enough() -> bool:
                answered = all(load.statuses[status] >= 8 for status in statuses)
                return answered and any(pending) and time.monotonic() > end

            await load.clients(connections, it.url, lambda: body, enough)
            watching.cancel()
            return load

        warm = asyncio.run(watched(2, min(seconds, 5), {200}))
        resident = it.metric("process_resident_memory_bytes")
        load = asyncio.run(watched(20, seconds, {200, 429}))
        growth = it.metric("process_resident_memory_bytes") / resident - 1
        for seen, name in ((warm, "two connections"), (load, "twenty")):
            print(f"{name}: {dict(seen.statuses)}, p99 of accepted {seen.percentile(99):.3f} s")
        print(f"memory {growth:+.1%}, at most {max(pending):.0f} images pending")
        assert set(warm.statuses) == {200}
        assert set(load.statuses) == {200, 429}
        assert load.lost == 0
        assert 0 < max(pending) <= limit
        assert growth < 0.1
        until(lambda: it.metric("fullrank_pending_images") == 0)


def test_overload_briefly(encoders: Path) -> None:
    overload(encoders, 0.5)


@pytest.mark.soak
def test_ten_times_the_load_for_a_minute(encoders: Path) -> None:
    overload(encoders, 60)


async def slowly(url: str, data: bytes) -> bytes:
    """Send a request a byte at a time until something comes back: that."""
    reader, writer = await connect(url)
    answer = asyncio.create_task(reader.read(4096))
    try:
        writer.write(data[:-500])
        for i in range(len(data) - 500, len(data) - 1):
            if (await asyncio.wait({answer}, timeout=0.2))[0]:
                break
            writer.write(data[i : i + 1])
        return await answer
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def half_closed(url: str, data: bytes) -> None:
    """Send a request, or half of one, close our side, and wait for the other to end it."""
    reader, writer = await connect(url)
    writer.write(data)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 120)
    writer.close()


@pytest.fixture(scope="module")
def common(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Path]]:
    """One replica for all who leave it alive, and the folder of its encoders, which is their own."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("alpha", "beta"):
        shutil.copytree(encoders / name, folder / name)
    with replica(encoder=folder / "alpha", encoders_dir=folder, windows="60,300") as it:
        yield it, folder


def test_slow_and_half_closed_clients_hold_nobody_up(common: tuple[Replica, Path]) -> None:
    it, whole = common[0], request(PNG)

    async def abuse() -> tuple[list[bytes], Load]:
        load, done = Load(), asyncio.Event()
        honest = asyncio.create_task(load.clients(2, it.url, lambda: whole, done.is_set))
        hurried = request(PNG, "image/png", "X-Request-Timeout: 1")
        late = asyncio.gather(*(slowly(it.url, hurried) for _ in range(40)))
        await asyncio.gather(
            *(half_closed(it.url, data) for data in (whole, whole[:-100], whole[:30]) for _ in range(20))
        )
        answers = await late
        done.set()
        await honest
        return answers, load

    answers, load = asyncio.run(abuse())
    print(f"{load.statuses[200]} answered meanwhile, the slowest in {max(load.seconds):.3f} s")
    assert {answer[9:12] for answer in answers} == {b"408"}
    assert set(load.statuses) == {200}
    assert load.lost == 0
    until(lambda: it.metric("fullrank_pending_images") == 0)


def hours(it: Replica, requests: int) -> None:
    """So many requests, no two images alike; memory after the first fifth and at the end."""
    rng, load = np.random.default_rng(0), Load()

    def unlike() -> bytes:
        return request(BMP[:PIXELS] + rng.integers(0, 256, 28 * 28, np.uint8).tobytes(), "image/bmp")

    asyncio.run(load.clients(8, it.url, unlike, lambda: sum(load.statuses.values()) >= requests // 5))
    resident, started = it.metric("process_resident_memory_bytes"), time.monotonic()
    asyncio.run(load.clients(8, it.url, unlike, lambda: sum(load.statuses.values()) >= requests))
    rate = 0.8 * requests / (time.monotonic() - started)
    growth = it.metric("process_resident_memory_bytes") / resident - 1
    print(f"{requests} at {rate:.0f}/s: {dict(load.statuses)}, memory {growth:+.2%} of {resident / 1e6:.0f} MB")
    assert set(load.statuses) == {200}
    assert growth < 0.05


def test_memory_stays_over_some_requests(common: tuple[Replica, Path]) -> None:
    hours(common[0], 600)


@pytest.mark.soak
def test_an_hour_of_requests_in_minutes(common: tuple[Replica, Path]) -> None:
    hours(common[0], 36_000)  # ten a second for an hour


def test_sigterm_under_load_loses_nothing_accepted(encoders: Path) -> None:
    with replica(encoder=encoders / "alpha", drain_seconds=600) as it:
        load = Load()

        async def terminate() -> None:
            while load.statuses[200] < 50:
                await asyncio.sleep(0.01)
            it.process.send_signal(signal.SIGTERM)

        async def both() -> None:
            await asyncio.gather(load.clients(12, it.url, lambda: multipart(4), lambda: False), terminate())

        asyncio.run(both())  # ends when every connection was told to close
        assert set(load.statuses) == {200}
        assert load.lost == 0
        it.process.send_signal(signal.SIGTERM)  # a second one ends the wait
        assert it.process.wait(120) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    "delays", [(0.02,), pytest.param((0.0, 0.01, 0.05, 0.1, 0.2), marks=pytest.mark.soak)], ids=["once", "often"]
)
def test_a_kill_during_a_swap_leaves_encoders_that_serve(
    encoders: Path, tmp_path: Path, delays: tuple[float, ...]
) -> None:
    for name in ("alpha", "beta"):
        shutil.copytree(encoders / name, tmp_path / name)
    for delay in delays:
        with replica(encoder=tmp_path / "alpha", encoders_dir=tmp_path) as it:

            async def swap_and_kill(it: Replica = it, delay: float = delay) -> None:
                async with httpx.AsyncClient(base_url=it.url, timeout=120) as client:
                    swap = asyncio.create_task(client.post("/admin/encoders", json={"name": "beta"}))
                    await asyncio.sleep(delay)
                    it.process.kill()
                    with contextlib.suppress(httpx.TransportError):
                        await swap

            asyncio.run(swap_and_kill())
    for name in ("alpha", "beta"):
        assert artifact.load(tmp_path / name).card == artifact.load(encoders / name).card


def test_an_encoder_damaged_in_place_is_refused_and_the_old_one_serves_on(common: tuple[Replica, Path]) -> None:
    it, folder = common
    before = httpx.post(it.url + "/embed", content=PNG).json()
    for name, file in (("beta", "encoder.safetensors"), ("alpha", "encoder.safetensors"), ("beta", "encoder.json")):
        path = folder / name / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        error = error_of(httpx.post(it.url + "/admin/encoders", json={"name": name}, timeout=120), 422, "bad_artifact")
        assert file in error["message"]
        assert httpx.post(it.url + "/embed", content=PNG).json() == before
    assert get(it.url + "/readyz").status_code == 200
