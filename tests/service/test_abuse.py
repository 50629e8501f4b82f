"""A replica in a process of its own, abused: too much load, slow clients, kills, damaged encoders, hours of requests.

The long ones are `soak`; each has a short version beside it. `-s` shows the figures.
"""

import asyncio
import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from models import artifact
from tests.service.conftest import encoded, error_of, pictures
from tests.service.test_service_process import PROGRAM, await_ready, free_port

PNG = encoded(pictures(1)[0])
BMP = encoded(pictures(1)[0], "BMP")
PIXELS = len(BMP) - 28 * 28  # where an uncompressed grey BMP's pixels begin


class Replica:
    """A served encoder in a child process."""

    def __init__(self, encoders: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        values = {"encoder": encoders / "alpha", "encoders_dir": encoders, "port": self.port, "threads": 1} | settings
        environment = {f"FULLRANK_{name.upper()}": str(value) for name, value in values.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            cwd=Path(__file__).parents[2],
        )

    def metric(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics", timeout=30).text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


@contextlib.contextmanager
def replica(encoders: Path, **settings: object) -> Iterator[Replica]:
    it = Replica(encoders, **settings)
    try:
        await_ready(it.url)
        yield it
    finally:
        it.process.kill()
        it.process.wait()


def request(body: bytes, kind: str = "image/png", *headers: str) -> bytes:
    lines = ["POST /embed HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Accept: application/octet-stream", *headers, "", ""]).encode() + body


def multipart(images: int) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n' + PNG + b"\r\n"
    return request(part * images + b"--b--\r\n", "multipart/form-data; boundary=b")


@dataclass
class Load:
    """What closed-loop clients saw."""

    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)  # of those answered 200
    lost: int = 0  # sent on a connection that was not closing, and never answered

    async def client(self, port: int, make: Callable[[], bytes], until: Callable[[], bool]) -> None:
        """Send one request after another on one connection until told to stop or that it closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
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
                if status == 200:
                    self.seconds.append(time.monotonic() - started)
                if b"connection: close" in lines:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        finally:
            writer.close()

    async def clients(self, number: int, port: int, make: Callable[[], bytes], until: Callable[[], bool]) -> None:
        await asyncio.gather(*(self.client(port, make, until) for _ in range(number)))


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def overload(encoders: Path, seconds: float) -> None:
    """Two connections keep it busy; twenty, ten times the load, get answers or a 429, and soon."""
    body = multipart(16)
    with replica(encoders, max_pending_images=64, max_images_per_request=32, max_batch=8) as it:
        warm = Load()
        asyncio.run(warm.clients(2, it.port, lambda: body, after(min(seconds, 5))))
        resident, load = it.metric("process_resident_memory_bytes"), Load()
        asyncio.run(load.clients(20, it.port, lambda: body, after(seconds)))
        growth = it.metric("process_resident_memory_bytes") / resident - 1
        p99 = float(np.percentile(load.seconds, 99))
        print(f"overload {seconds} s: {dict(load.statuses)}, p99 of accepted {p99:.3f} s, memory {growth:+.1%}")
        assert set(load.statuses) == {200, 429}
        assert load.lost == 0
        # At most 64 images wait: four of these requests, however many more are refused.
        assert p99 < 8 * float(np.percentile(warm.seconds, 99)) + 0.5
        assert growth < 0.1
        assert it.metric("fullrank_pending_images") == 0


def test_overload_briefly(encoders: Path) -> None:
    overload(encoders, 2)


@pytest.mark.soak
def test_ten_times_the_load_for_a_minute(encoders: Path) -> None:
    overload(encoders, 60)


async def slowly(port: int, data: bytes, pause: float) -> bytes:
    """Send a request a few bytes at a time; what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for start in range(0, len(data), 16):
            writer.write(data[start : start + 16])
            await asyncio.sleep(pause)
        return await asyncio.wait_for(reader.read(4096), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def half_closed(port: int, data: bytes) -> None:
    """Send a request, or half of one, close our side, and wait for the other to end it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 30)
    writer.close()


def test_slow_and_half_closed_clients_hold_nobody_up(encoders: Path) -> None:
    whole = request(PNG)

    async def abuse(port: int) -> tuple[list[bytes], Load]:
        load, done = Load(), asyncio.Event()
        honest = asyncio.create_task(load.clients(2, port, lambda: whole, done.is_set))
        late = asyncio.gather(*(slowly(port, whole, 0.2) for _ in range(40)))
        await asyncio.gather(
            *(half_closed(port, data) for data in (whole, whole[:-100], whole[:30]) for _ in range(20))
        )
        answers = await late
        done.set()
        await honest
        return answers, load

    with replica(encoders, request_timeout=1) as it:
        answers, load = asyncio.run(abuse(it.port))
        assert {answer[9:12] for answer in answers} <= {b"408", b""}
        assert any(answer[9:12] == b"408" for answer in answers)
        assert set(load.statuses) == {200}
        assert load.lost == 0
        assert max(load.seconds) < 2
        assert it.metric("fullrank_pending_images") == 0


def hours(encoders: Path, requests: int) -> None:
    """So many requests, no two images alike; memory after the first fifth and at the end."""
    rng = np.random.default_rng(0)

    def unlike() -> bytes:
        return request(BMP[:PIXELS] + rng.integers(0, 256, 28 * 28, np.uint8).tobytes(), "image/bmp")

    with replica(encoders, windows="60,300") as it:
        load = Load()
        asyncio.run(load.clients(8, it.port, unlike, lambda: sum(load.statuses.values()) >= requests // 5))
        resident, started = it.metric("process_resident_memory_bytes"), time.monotonic()
        asyncio.run(load.clients(8, it.port, unlike, lambda: sum(load.statuses.values()) >= requests))
        rate = 0.8 * requests / (time.monotonic() - started)
        growth = it.metric("process_resident_memory_bytes") / resident - 1
        print(f"{requests} at {rate:.0f}/s: {dict(load.statuses)}, memory {growth:+.2%} of {resident / 1e6:.0f} MB")
        assert set(load.statuses) == {200}
        assert growth < 0.05


def test_memory_stays_over_some_requests(encoders: Path) -> None:
    hours(encoders, 1500)


@pytest.mark.soak
def test_an_hour_of_requests_in_minutes(encoders: Path) -> None:
    hours(encoders, 36_000)  # ten a second for an hour


def test_sigterm_under_load_loses_nothing_accepted(encoders: Path) -> None:
    with replica(encoders, drain_seconds=1) as it:
        load = Load()

        async def terminate() -> None:
            while load.statuses[200] < 50:
                await asyncio.sleep(0.01)
            it.process.send_signal(signal.SIGTERM)

        async def both() -> None:
            await asyncio.gather(load.clients(12, it.port, lambda: multipart(4), lambda: False), terminate())

        asyncio.run(both())  # ends when every connection was told to close
        assert set(load.statuses) == {200}
        assert load.lost == 0
        assert it.process.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    "delays", [(0.02,), pytest.param((0.0, 0.01, 0.05, 0.1, 0.2), marks=pytest.mark.soak)], ids=["once", "often"]
)
def test_a_kill_during_a_swap_leaves_encoders_that_serve(
    encoders: Path, tmp_path: Path, delays: tuple[float, ...]
) -> None:
    for name in ("alpha", "beta"):
        shutil.copytree(encoders / name, tmp_path / name)
    for delay in delays:
        with replica(tmp_path) as it:

            async def swap_and_kill(it: Replica = it, delay: float = delay) -> None:
                async with httpx.AsyncClient(base_url=it.url) as client:
                    swap = asyncio.create_task(client.post("/admin/encoders", json={"name": "beta"}))
                    await asyncio.sleep(delay)
                    it.process.kill()
                    with contextlib.suppress(httpx.TransportError):
                        await swap

            asyncio.run(swap_and_kill())
    for name in ("alpha", "beta"):
        assert artifact.load(tmp_path / name).card == artifact.load(encoders / name).card
    with replica(tmp_path) as it:
        assert httpx.post(it.url + "/embed", content=PNG).status_code == 200


def test_an_encoder_damaged_in_place_is_refused_and_the_old_one_serves_on(encoders: Path, tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        shutil.copytree(encoders / name, tmp_path / name)
    with replica(tmp_path) as it:
        before = httpx.post(it.url + "/embed", content=PNG).json()
        for name, file in (("beta", "encoder.safetensors"), ("alpha", "encoder.safetensors"), ("beta", "encoder.json")):
            path = tmp_path / name / file
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            error = error_of(
                httpx.post(it.url + "/admin/encoders", json={"name": name}, timeout=30), 422, "bad_artifact"
            )
            assert file in error["message"]
            assert httpx.post(it.url + "/embed", content=PNG).json() == before
        assert httpx.get(it.url + "/readyz").status_code == 200
