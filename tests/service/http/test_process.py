"""A real uvicorn on loopback: draining, sockets that misbehave, a start that fails."""

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.http.app import Server, serve, unheard
from service.settings import Settings
from tests.support.app import held
from tests.support.images import as_files, encoded, pictures
from tests.support.process import get, ready, running, until
from tools.stack import free_port

IMAGES = [encoded(picture) for picture in pictures(4)]


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


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1", "localhost"])
def test_only_an_address_that_is_taken_is_a_reason_not_to_serve(settings: Callable[..., Settings], host: str) -> None:
    chosen = settings(host=host, port=free_port())
    assert unheard(chosen) is None
    assert unheard(chosen) is None, "to try it is not to keep it"
    with socket.create_server(("0.0.0.0", chosen.port)):
        assert unheard(chosen) == (
            f"{host}:{chosen.port}: Address already in use; set FULLRANK_PORT, or end who listens there"
        )


def test_an_encoder_that_cannot_be_trusted_ends_serving_with_the_reason(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="nowhere is not a folder"):
        serve(settings(encoder=tmp_path / "nowhere", port=0))
