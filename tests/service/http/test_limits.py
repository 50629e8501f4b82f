"""What comes before a body is bounded in size and time, on real sockets."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import orjson
import pytest

from service.http.app import Server
from service.http.limits import HEAD_BYTES
from service.settings import Settings
from tests.support.images import encoded, pictures
from tests.support.process import running

PNG = encoded(pictures(1)[0])
MUCH = 32 * 2**20  # more than the kernel keeps for a socket that nobody reads
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(settings: Callable[..., Settings]) -> Iterator[tuple[str, Server]]:
    with running(settings(request_timeout=120)) as both:
        yield both


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=120)


def received(it: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := it.recv(65536):
            parts.append(part)
    return b"".join(parts)


def count(server: Server, code: str) -> float:
    labels = {"route": "other", "code": code}
    return server.service.metrics.registry.get_sample_value("fullrank_requests_total", labels) or 0.0


def refusal(answer: bytes, status: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b"connection: close" in head.lower()
    assert b"content-length: %d" % len(body) in head.lower()
    error: dict[str, str] = orjson.loads(body)["error"]
    assert error["field"] == "headers"
    return error["message"]


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (GET + b"X-Value: ", b"a" * 65536),
        (GET, b"a" * 65536),
        (GET, b"x-y: 1\r\n" * 8192),
        (b"GET /healthz?", b"a" * 65536),
        (b"\r\n", b"\r\n" * 32768),
    ],
    ids=["value", "name", "many", "path", "nothing"],
)
def test_headers_without_end_are_refused_before_they_are_kept(
    server: tuple[str, Server], start: bytes, more: bytes
) -> None:
    url, it = server
    before = count(it, "431")
    with connect(url) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(start)
            for _ in range(MUCH // len(more)):
                client.sendall(more)
            pytest.fail("the server took it all")
        assert str(HEAD_BYTES) in refusal(received(client), b"431 Request Header Fields Too Large")
    assert count(it, "431") == before + 1
    assert httpx.post(url + "/embed", content=PNG).status_code == 200


def test_headers_after_a_body_are_no_way_around(server: tuple[str, Server]) -> None:
    url, it = server
    with connect(url) as client, contextlib.suppress(ConnectionError):
        client.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\nX-Value: " % (len(PNG), PNG))
        for _ in range(MUCH // 65536):
            client.sendall(b"a" * 65536)
        pytest.fail("the server took it all")
    while it.service.admission.pending:
        time.sleep(0.01)
    assert httpx.post(url + "/embed", content=PNG).status_code == 200


def test_ordinary_and_long_headers_pass_in_any_pieces(server: tuple[str, Server]) -> None:
    url, _ = server
    long = {"X-Value": "a" * (HEAD_BYTES - 1024)}
    with httpx.Client(base_url=url, headers=long) as client:
        for _ in range(3):  # each on the same connection: nothing adds up
            assert client.post("/embed", content=PNG * 1000).status_code == 200
            assert client.get("/healthz").status_code == 200
    with connect(url) as it:
        whole = CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(PNG), PNG) for _ in range(3)) + b"0\r\nX-After: 1\r\n\r\n"
        for i in range(0, len(whole), 64):
            it.sendall(whole[i : i + 64])
        it.sendall(GET + b"Connection: close\r\n\r\n")
        assert received(it).count(b"HTTP/1.1 200") == 2


def test_what_does_not_come_is_not_waited_for(settings: Callable[..., Settings]) -> None:
    """No headers, half of them, no body, and half of a second request: all at once, for each takes the whole time."""
    with running(settings(request_timeout=4)) as (url, _), contextlib.ExitStack() as open_sockets:
        nothing, half, bodiless, again = (open_sockets.enter_context(connect(url)) for _ in range(4))
        half.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        bodiless.sendall(CHUNKED)
        again.sendall(GET + b"\r\n")
        assert b"alive" in again.recv(65536)
        again.sendall(GET)
        assert received(nothing) == b""  # fails if it does not end
        assert "4 s" in refusal(received(half), b"408 Request Timeout")
        assert b'"body_timeout"' in received(bodiless)
        refusal(received(again), b"408")
