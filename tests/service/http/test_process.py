"""A real uvicorn on loopback: draining, sockets that misbehave, a start that fails."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.http.app import Server, build_server, serve
from service.settings import Settings
from tests.service.conftest import as_files, encoded, held, pictures
from tools.stack import free_port

IMAGES = [encoded(picture) for picture in pictures(4)]
PROGRAM = (
    "from service.http.app import Server, build_server, serve; from service.settings import Settings; serve(Settings())"
)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come, however loaded the machine: it only has to end."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(url: str, **params: str) -> httpx.Response:
    """For polling: without reading the machine's certificates each time, which takes longer than the request."""
    return httpx.get(url, params=params, verify=False, timeout=120)


def ready(url: str) -> bool:
    try:
        return get(url + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, Server]]:
    """A real uvicorn on loopback, on a thread of this process."""
    server = build_server(settings.model_copy(update={"port": 0}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        until(lambda: ready(url))
        yield url, server
    finally:
        server.should_exit = True
        thread.join(120)


@dataclass
class Replica:
    url: str
    process: subprocess.Popen[bytes]

    def metric(self, name: str) -> float:
        lines = get(self.url + "/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def replica(log: Path | None = None, **settings: object) -> Iterator[Replica]:
    """A service in a process of its own, ready; its log goes to a file, if any. Killed in the end."""
    values = {"port": (port := free_port()), "threads": 1} | settings
    environment = {f"FULLRANK_{name.upper()}": str(value) for name, value in values.items()}
    with open(log, "ab") if log else nullcontext() as stderr:  # noqa: PTH123
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            cwd=Path(__file__).parents[3],
            stderr=stderr,
        )
    it = Replica(f"http://127.0.0.1:{port}", process)
    try:
        until(lambda: ready(it.url))
        yield it
    finally:
        process.kill()
        process.wait()


def test_draining_turns_readiness_off_and_loses_no_request(settings: Callable[..., Settings]) -> None:
    with running(settings(drain_seconds=600)) as (url, server):
        statuses: list[int] = []
        unready = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=120) as client:
                # A balanced client: it leaves when readiness says so, and not before.
                while not unready.is_set():
                    statuses.append(client.post(url + "/embed", files=as_files(IMAGES)).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) >= 8)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: not ready(url))
        answered = len(statuses)
        until(lambda: len(statuses) >= answered + 4)  # still served while draining
        unready.set()
        for thread in threads:
            thread.join(120)
        assert set(statuses) == {200}


def misbehave(url: str, server: Server) -> None:
    """Sockets that lie, stop half-way or leave; the replica must refuse, count, forget and go on."""
    address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"

    with socket.create_connection(address) as it:  # a chunked body without end
        it.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(16):
            it.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        assert b" 413 " in it.recv(4096).split(b"\r\n")[0]

    with socket.create_connection(address) as it:  # a length that lies, refused before the body is sent
        it.sendall(head + b"Content-Length: 999999999\r\n\r\n")
        assert b" 413 " in it.recv(4096).split(b"\r\n")[0]

    with socket.create_connection(address) as it:  # half a body, then gone
        it.sendall(head + b"Content-Length: 1000\r\n\r\nhalf")

    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n' + IMAGES[i % 4] + b"\r\n"
        for i in range(100)
    )
    head = head.replace(b"image/png", b"multipart/form-data; boundary=b")
    dropped = 'fullrank_rejected_images_total{reason="disconnected"} 100.0'
    with held(server.service.current) as hold:
        with socket.create_connection(address) as it:  # a whole request, then gone: its images are dropped
            it.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(body) + 7) + body + b"--b--\r\n")
            assert hold.entered.wait(120)
        until(lambda: dropped in get(url + "/metrics").text)
    metrics = httpx.get(url + "/metrics").text
    assert "fullrank_pending_images 0.0" in metrics
    assert httpx.post(url + "/embed", files=as_files(IMAGES)).status_code == 200
    assert 'fullrank_requests_total{code="500",route="/embed"} 0.0' in metrics


def test_sockets_that_misbehave(settings: Callable[..., Settings]) -> None:
    with running(settings(max_batch=1, max_body_bytes=200_000)) as both:
        misbehave(*both)


def test_sigterm_answers_what_was_accepted(settings: Callable[..., Settings]) -> None:
    with running(settings(max_batch=1, request_timeout=600)) as (url, server):
        statuses: list[int] = []
        with held(server.service.current):
            many = [IMAGES[i % 4] for i in range(64)]
            threads = [
                threading.Thread(
                    target=lambda: statuses.append(
                        httpx.post(url + "/embed", files=as_files(many), timeout=120).status_code
                    )
                )
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            until(lambda: server.service.admission.pending == 192)
            server.handle_exit(signal.SIGTERM, None)
        for thread in threads:
            thread.join(120)
        assert statuses == [200] * 3
        until(lambda: server.service.phase == "stopped")


def test_an_encoder_that_cannot_be_trusted_ends_serving_with_the_reason(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="nowhere is not a folder"):
        serve(settings(encoder=tmp_path / "nowhere", port=0))
