"""What strangers tried on a real server: bodies before keys, requests that trickle, answers never read, floods."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import httpx
import orjson
import pytest

from service.http import limits
from service.http.app import Server
from service.settings import Settings
from tests.support.images import encoded, pictures
from tests.support.process import running, until
from tests.support.sockets import KEY, answer, connect, head, to_the_end, value

PNG = encoded(pictures(1)[0])
SECONDS = 2.0  # of request_timeout where it must pass
ROUTES = ["/embed", "/v1/embeddings", "/v2/models/alpha/infer", "/observe", "/admin/encoders"]


@pytest.fixture(scope="module")
def hasty(settings: Callable[..., Settings]) -> Iterator[tuple[str, Server]]:
    """A server whose requests have SECONDS, and whose answers little more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "GRACE", 0.5)
        with running(settings(request_timeout=SECONDS, api_key=KEY)) as both:
            yield both


# ---- keys before bodies


@pytest.mark.parametrize("path", ROUTES)
def test_the_key_is_asked_for_before_the_body_comes(locked: tuple[str, Server], path: str) -> None:
    url, _ = locked
    for key in ("", "Authorization: Bearer wrong horse"):
        with connect(url) as it:
            it.sendall(head("POST", path, 1000, "Content-Type: application/json", *([key] if key else [])))
            status, body = answer(it)  # with no byte of the body sent
            assert status == 401
            assert b"key" in body


@pytest.mark.parametrize(("path", "limit"), [("/admin/encoders", 8192), ("/embed", 32 * 2**20)])
def test_each_route_has_a_limit_of_bytes(locked: tuple[str, Server], path: str, limit: int) -> None:
    url, _ = locked
    with connect(url) as it:
        fields = "Content-Type: application/json", f"Authorization: Bearer {KEY}"
        it.sendall(head("POST", path, limit + 1, *fields))
        status, body = answer(it)
        assert (status, orjson.loads(body)["error"]["code"]) == (413, "body_too_large")
        assert str(limit) in orjson.loads(body)["error"]["message"]


def test_thirty_megabytes_of_brackets_cost_an_administrator_nothing(locked: tuple[str, Server]) -> None:
    url, server = locked
    with contextlib.suppress(httpx.TransportError):  # ours may close before it has sent all
        refused = httpx.post(
            url + "/admin/encoders",
            content=b"[" * 30_000_000,
            headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        )
        assert refused.status_code == 413
    until(lambda: value(server, "fullrank_pending_bytes") == 0)
    assert httpx.get(url + "/healthz").status_code == 200


# ---- one deadline for head, body and answer


@pytest.mark.parametrize(
    ("method", "path", "key", "statuses"),
    [
        ("POST", "/observe", KEY, {408}),
        ("POST", "/admin/encoders", KEY, {408}),
        ("POST", "/embed", KEY, {408}),
        ("POST", "/v1/embeddings", KEY, {408}),
        ("POST", "/v2/models/alpha/infer", KEY, {408}),
        ("POST", "/embed", "wrong horse", {401}),
        ("POST", "/nowhere", KEY, {404}),
        ("GET", "/healthz", KEY, {200}),
        ("GET", "/metrics", KEY, {200}),
        ("PUT", "/embed", KEY, {405}),
    ],
)
def test_a_body_that_trickles_ends_with_its_deadline(
    hasty: tuple[str, Server], method: str, path: str, key: str, statuses: set[int]
) -> None:
    url, _ = hasty
    with connect(url) as it:
        kind = "application/json" if path != "/embed" else "image/png"
        it.sendall(head(method, path, 5000, f"Content-Type: {kind}", f"Authorization: Bearer {key}"))
        ended = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(0.05):
                    it.sendall(b"[")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            received = to_the_end(it)  # fails if it does not end
        finally:
            ended.set()
            thread.join()
        assert {int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]} == statuses


def test_an_answer_nobody_reads_is_not_kept(hasty: tuple[str, Server]) -> None:
    url, server = hasty
    with socket.socket() as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        it.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        it.settimeout(0.2)
        with contextlib.suppress(OSError):
            for _ in range(5000):  # until the server reads no more, for it cannot write
                it.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        port = it.getsockname()[1]
        until(lambda: port not in {c.client[1] for c in server.server_state.connections.copy() if c.client})


def test_a_flood_of_pipelined_requests_is_cut_off(locked: tuple[str, Server]) -> None:
    url, server = locked
    with connect(url) as it:
        with contextlib.suppress(ConnectionError):
            it.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000)
        assert to_the_end(it).count(b"HTTP/1.1 200") <= limits.PIPELINED + 1
    with connect(url) as it:
        it.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        received = b""
        while received.count(b"alive") < 20:
            received += it.recv(65536)
    assert not server.service.failure


# ---- how much at once


def test_bytes_in_flight_are_bounded_and_counted(settings: Callable[..., Settings]) -> None:
    limit, part = 2**20, 500_000
    with running(settings(max_pending_bytes=limit)) as (url, server), contextlib.ExitStack() as stack:
        held = value(server, "fullrank_pending_bytes_limit")
        assert held == limit
        clients = [stack.enter_context(connect(url)) for _ in range(5)]
        kept = 0
        for it in clients:
            it.sendall(head("POST", "/embed", part + 1, "Content-Type: image/png") + b"x" * part)
            kept += part
            if kept > limit:
                status, body = answer(it)
                assert (status, orjson.loads(body)["error"]["code"]) == (429, "overloaded")
                kept -= part
            else:
                until(lambda kept=kept: value(server, "fullrank_pending_bytes") == kept)  # type: ignore[misc]
        assert value(server, "fullrank_pending_bytes") <= limit
        assert httpx.post(url + "/embed", content=PNG).status_code == 200  # an honest image finds room
        for it in clients:
            it.close()
        until(lambda: value(server, "fullrank_pending_bytes") == 0)
        assert value(server, "fullrank_requests_total", route="/embed", code="429") == 3


def test_connections_are_bounded(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(settings(max_connections=8)) as (url, server), contextlib.ExitStack() as stack:
        until(lambda: value(server, "fullrank_connections") == 0)
        busy = [stack.enter_context(connect(url)) for _ in range(7)]
        for it in busy:
            it.sendall(head("POST", "/embed", 1000, "Content-Type: image/png"))
        idle = stack.enter_context(connect(url))
        until(lambda: value(server, "fullrank_connections") == 8)
        assert value(server, "fullrank_connections_limit") == 8
        with connect(url) as it:  # who looks after it is answered all the same
            it.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"alive" in to_the_end(it)
        with connect(url) as it:  # nobody has been idle for long: it is told
            it.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n")
            status, body = answer(it)
            assert (status, orjson.loads(body)["error"]["code"]) == (503, "too_many_connections")
            assert to_the_end(it) == b""
        assert value(server, "fullrank_requests_total", route="other", code="503") == 1
        monkeypatch.setattr(limits, "IDLE", -1.0)

        def answered() -> bool:  # it searches for idle connections once a second
            with connect(url) as it:
                it.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return answer(it)[0] == 200

        until(answered)
        assert to_the_end(idle) == b""
        flood = [stack.enter_context(connect(url)) for _ in range(40)]
        until(lambda: value(server, "fullrank_connections") <= 8 + 2 + 16)
        assert len(flood) == 40


def test_json_of_very_many_values_is_refused_or_read_apart(locked: tuple[str, Server]) -> None:
    url, _ = locked
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    million = b"[" + b"0," * 999_999 + b"0]"
    bodies = {
        "/embed": b'{"images": ' + million + b"}",
        "/v1/embeddings": b'{"model": "alpha", "input": ' + million + b"}",
        "/observe": b'{"model": "x", "rows": [' + b"[]," * 200_000 + b"[]]}",
        "/v2/models/alpha/infer": b"{" + b",".join(b'"%d":0' % i for i in range(20_000)) + b"}",
    }
    for path, body in bodies.items():
        refused = httpx.post(url + path, content=body, headers=headers)
        assert refused.status_code == 413, (path, refused.text[:200])
        assert "values" in refused.text or "lists" in refused.text or "fields" in refused.text
    rows = orjson.dumps({"model": "wide", "rows": [[0.5 + i, -1.0] * 128 for i in range(3000)]})
    taken = httpx.post(url + "/observe", content=rows, headers=headers)
    assert (taken.status_code, taken.json()["rows"]) == (202, 3000)


# ---- clients that stop half-way


def test_a_client_that_closes_its_side_after_a_whole_request_is_answered(locked: tuple[str, Server]) -> None:
    url, _ = locked
    whole = head("POST", "/embed", len(PNG), "Content-Type: image/png", f"Authorization: Bearer {KEY}") + PNG
    for version in (b"HTTP/1.1", b"HTTP/1.0"):
        with connect(url) as it:
            it.sendall(whole.replace(b"HTTP/1.1", version))
            it.shutdown(socket.SHUT_WR)
            received = to_the_end(it)
            assert received.count(b" 200 OK\r\n") == 1, received[:200]
            assert b'"embeddings"' in received
    for part in (whole[:-1], whole[:40]):  # what is not whole is not answered for long
        with connect(url) as it:
            it.sendall(part)
            it.shutdown(socket.SHUT_WR)
            assert b" 200 OK" not in to_the_end(it)


def test_a_client_that_resets_while_it_waits_is_let_go(locked: tuple[str, Server]) -> None:
    url, server = locked
    before = value(server, "fullrank_requests_total", route="/embed", code="499")
    with connect(url) as it:
        it.sendall(head("POST", "/embed", 1000, "Content-Type: image/png", f"Authorization: Bearer {KEY}") + b"x")
        it.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: value(server, "fullrank_requests_total", route="/embed", code="499") == before + 1)
