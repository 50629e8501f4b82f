"""What is no request, or hardly one: each gets the JSON of every failure, and is counted."""

import orjson
import pytest

from service.http.app import Server
from tests.support.sockets import connect, head, to_the_end, value


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_gets_the_json_of_every_failure_and_is_counted(
    locked: tuple[str, Server], data: bytes
) -> None:
    url, server = locked
    before = value(server, "fullrank_requests_total", route="other", code="400")
    with connect(url) as it:
        it.sendall(data)
        received = to_the_end(it)
    start, _, body = received.partition(b"\r\n\r\n")
    if b" 401 " in start.split(b"\r\n")[0]:  # the key was decided before the body went wrong
        return
    assert start.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"content-type: application/json" in start.lower()
    assert orjson.loads(body)["error"]["code"] == "malformed_request"
    assert value(server, "fullrank_requests_total", route="other", code="400") == before + 1


def test_what_follows_a_whole_request_does_it_no_harm(locked: tuple[str, Server]) -> None:
    url, _ = locked
    with connect(url) as it:
        it.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nrubbish\r\n\r\n")
        received = to_the_end(it)
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert b"alive" in received


def test_an_upgrade_is_answered_as_any_request(locked: tuple[str, Server]) -> None:
    url, _ = locked
    with connect(url) as it:
        upgrade = "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
        it.sendall(head("GET", "/healthz", 0, *upgrade, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="))
        assert b"alive" in to_the_end(it)
