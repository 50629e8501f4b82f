"""A real uvicorn on loopback: draining, sockets that misbehave, a start that fails."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.app import Server, build_server, serve
from service.settings import Settings
from tests.service.conftest import as_files, encoded, pictures

IMAGES = [encoded(picture) for picture in pictures(4)]
PROGRAM = (
    "from service.app import Server, build_server, serve; from service.settings import Settings; serve(Settings())"
)


def await_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("not ready in a minute")


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port: int = it.getsockname()[1]
        return port


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, Server]]:
    """A real uvicorn on loopback, on a thread of this process."""
    server = build_server(settings)
    with run(server) as url:
        yield url, server


@contextmanager
def run(server: Server) -> Iterator[str]:
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{server.config.port}"
    try:
        await_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)


def test_draining_turns_readiness_off_and_loses_no_request(settings: Callable[..., Settings]) -> None:
    with running(settings(port=free_port(), drain_seconds=1.0)) as (url, server):
        statuses: list[int] = []
        unready = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=30) as client:
                # A balanced client: it leaves when readiness says so, and not before.
                while not unready.is_set():
                    statuses.append(client.post(url + "/embed", files=as_files(IMAGES)).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(statuses) < 8:
            time.sleep(0.01)
        server.handle_exit(signal.SIGTERM, None)
        while httpx.get(url + "/readyz").status_code == 200:
            time.sleep(0.01)
        answered = len(statuses)
        while len(statuses) < answered + 4:  # still served while draining
            time.sleep(0.01)
        unready.set()
        for thread in threads:
            thread.join(20)
        assert set(statuses) == {200}


def misbehave(url: str) -> None:
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
    with socket.create_connection(address) as it:  # a whole request, then gone: its images are dropped
        it.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(body) + 7) + body + b"--b--\r\n")
    time.sleep(0.05)

    deadline, metrics = time.monotonic() + 20, ""
    while 'fullrank_rejected_images_total{reason="disconnected"} 100.0' not in metrics:
        assert time.monotonic() < deadline, metrics
        time.sleep(0.02)
        metrics = httpx.get(url + "/metrics").text
    assert "fullrank_pending_images 0.0" in metrics
    assert httpx.post(url + "/embed", files=as_files(IMAGES)).status_code == 200
    assert 'fullrank_requests_total{code="500",route="/embed"} 0.0' in metrics


def test_sockets_that_misbehave(settings: Callable[..., Settings]) -> None:
    with running(settings(port=free_port(), max_batch=1, max_body_bytes=200_000)) as (url, _):
        misbehave(url)


def test_sigterm_answers_what_was_accepted(encoders: Path) -> None:
    port = free_port()
    values = {"ENCODER": encoders / "alpha", "PORT": port, "THREADS": 1, "MAX_BATCH": 1}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {f"FULLRANK_{name}": str(value) for name, value in values.items()} | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await_ready(url)
        many = [IMAGES[i % 4] for i in range(64)]
        statuses: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(httpx.post(url + "/embed", files=as_files(many), timeout=30).status_code)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        while "fullrank_pending_images 192.0" not in httpx.get(url + "/metrics").text:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 3
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_an_encoder_that_cannot_be_trusted_ends_serving_with_the_reason(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="nowhere is not a folder"):
        serve(settings(encoder=tmp_path / "nowhere", port=0))
