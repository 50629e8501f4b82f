"""HTTP by hand over a raw socket, for what no well-behaved client sends."""

import contextlib
import socket

from service.http.app import Server

KEY = "correct horse"
"""The key of the server `locked` in tests/service/http/conftest.py."""


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=120)


def head(method: str, path: str, length: int, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def answer(it: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = it.recv(65536)
        assert part, data
        data += part
    start, _, body = data.partition(b"\r\n\r\n")
    fields = start.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in fields if line.startswith(b"content-length:"))
    while len(body) < length:
        body += it.recv(65536)
    return int(start.split(b" ", 2)[1]), body[:length]


def to_the_end(it: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := it.recv(65536):
            data += part
    return data


def value(server: Server, name: str, **labels: str) -> float:
    """A metric of a server that runs in this process."""
    return server.service.metrics.registry.get_sample_value(name, labels) or 0.0
