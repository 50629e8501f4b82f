"""The attacks of test_attacks.py at full size, against a process of its own."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.images import encoded, pictures
from tests.support.process import replica, until
from tests.support.sockets import KEY, answer, connect, head

PNG = encoded(pictures(1)[0])


@pytest.mark.soak
def test_bodies_before_keys_at_full_size(encoders: Path) -> None:
    """30 MB for /admin/encoders, four at once: they cost no CPU and no memory, and health answers meanwhile."""
    with replica(encoder=encoders / "alpha", api_key=KEY) as it:
        before, cpu = it.metric("process_resident_memory_bytes"), it.metric("process_cpu_seconds_total")
        body = b"[" + b"[]," * 9_999_999 + b"[]]"

        def send() -> None:
            with connect(it.url) as client:
                with contextlib.suppress(OSError):
                    client.sendall(head("POST", "/admin/encoders", len(body), "Content-Type: application/json") + body)
                assert answer(client)[0] == 401

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(send) for _ in range(4)]:
                done.result()
        print(f"{it.metric('process_cpu_seconds_total') - cpu:.1f} s of CPU for {4 * len(body) / 1e6:.0f} MB")
        assert it.metric("process_resident_memory_bytes") - before < 20e6


@pytest.mark.soak
def test_forty_connections_of_31_megabytes_at_full_size(encoders: Path) -> None:
    limit = 256 * 2**20
    with replica(encoder=encoders / "alpha") as it, contextlib.ExitStack() as stack:
        before = it.metric("process_resident_memory_bytes")
        clients = [stack.enter_context(connect(it.url)) for _ in range(40)]
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(head("POST", "/embed", 32_000_000, "Content-Type: image/png") + b"x" * 31_000_000)
        assert 0 < it.metric("fullrank_pending_bytes") <= limit
        growth = it.metric("process_resident_memory_bytes") - before
        print(f"{growth / 1e6:.0f} MB more for {40 * 31} MB sent")
        assert growth < 1.5 * limit
        assert httpx.post(it.url + "/embed", content=PNG).status_code == 200
        stack.close()
        until(lambda: it.metric("fullrank_pending_bytes") == 0)


@pytest.mark.soak
def test_three_hundred_trickles_and_readers_of_nothing_at_full_size(encoders: Path) -> None:
    """All of them end, none keeps the honest waiting, and no connection stays."""
    with replica(encoder=encoders / "alpha", request_timeout=5) as it, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(it.url)) for _ in range(300)]
        for number, client in enumerate(clients):
            path = ("/embed", "/observe", "/admin/encoders", "/nowhere", "/v1/embeddings")[number % 5]
            client.sendall(head("POST", path, 5000, "Content-Type: application/json") + b"{")
            client.setblocking(False)
        left = set(clients)
        until_all = time.monotonic() + 120
        while left:
            assert time.monotonic() < until_all
            for client in left.copy():
                try:
                    client.send(b" ")
                    while client.recv(65536):
                        pass
                    left.discard(client)
                except BlockingIOError:
                    pass
                except OSError:
                    left.discard(client)
            assert httpx.post(it.url + "/embed", content=PNG).status_code == 200
        until(lambda: it.metric("fullrank_connections") <= 2)
