"""Answers in one write: the bytes are those that uvicorn itself writes in two or more."""

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.http.sending import OneWrite

pytestmark = pytest.mark.anyio
Sent = tuple[list[bytes], str, bool]


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.ended = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.ended = True


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def length(size: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % size


async def sent(kind: type[RequestResponseCycle], messages: list[dict[str, Any]], **options: Any) -> Sent:
    """What reaches the wire, the error if one is raised, and whether the connection ends."""
    wire = Wire()
    done: list[bool] = []
    cycle = kind(
        scope={"method": options.pop("method", "POST")},  # type: ignore[typeddict-item]
        transport=wire,
        flow=FlowControl(wire),
        logger=logging.getLogger("test"),
        access_logger=logging.getLogger("test"),
        access_log=False,
        default_headers=[(b"date", b"today")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=options.pop("keep_alive", True),
        on_response=lambda: done.append(True),
    )
    vars(cycle).update(options)
    error = ""
    try:
        for message in messages:
            await cycle.send(message)  # type: ignore[arg-type]
    except RuntimeError as raised:
        error = str(raised)
    assert done == [True] * cycle.response_complete
    assert cycle.response_complete == cycle.message_event.is_set()
    return wire.writes, error, wire.ended


SPELLED = [start((b"Content-Length", b"5"), (b"X-Model", b"beta")), body(b"rows!")]
USUAL = [start(length(5), (b"x-model", b"beta")), body(b"rows!")]
EMPTY = [start(length(0), status=204), body(b"")]


NO_MORE = [start(length(5)), {"type": "http.response.body", "body": b"rows!"}]


@pytest.mark.parametrize("messages", [USUAL, EMPTY, SPELLED, NO_MORE])
async def test_a_whole_answer_is_one_write(messages: list[dict[str, Any]]) -> None:
    ours, theirs = await sent(OneWrite, messages), await sent(RequestResponseCycle, messages)
    assert ours[0] == [b"".join(theirs[0])]
    assert ours[1:] == theirs[1:] == ("", False)


OTHERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "length unknown": ([start(), body(b"a", more=True), body(b"b")], {}),
    "in pieces": ([start(length(2)), body(b"a", more=True), body(b"b")], {}),
    "too short": ([start(length(5)), body(b"a")], {}),
    "too long": ([start(length(1)), body(b"rows!")], {}),
    "the last": ([start(length(1), (b"connection", b"close")), body(b"a")], {}),
    "the last, by the client": ([start(length(1)), body(b"a")], {"keep_alive": False}),
    "to HEAD": ([start(length(1)), body(b"a")], {"method": "HEAD"}),
    "chunked by the route": ([start(length(1), (b"transfer-encoding", b"chunked")), body(b"a")], {}),
    "a header in two lines": ([start(length(1), (b"x-model", b"a\r\nset-cookie: b")), body(b"a")], {}),
    "a name that is none": ([start(length(1), (b"x model", b"a")), body(b"a")], {}),
    "client gone": (USUAL, {"disconnected": True}),
    "a second answer": ([*USUAL, *USUAL], {}),
    "a second head": ([start(length(0)), start(), body(b"")], {}),
    "a body first": ([body(b"a")], {}),
}


@pytest.mark.parametrize("name", OTHERS)
async def test_what_is_unusual_goes_uvicorns_way(name: str) -> None:
    messages, options = OTHERS[name]
    ours = await sent(OneWrite, messages, **options)
    theirs = await sent(RequestResponseCycle, messages, **options)
    assert b"".join(ours[0]) == b"".join(theirs[0])
    assert ours[1:] == theirs[1:]


async def test_a_route_that_fails_between_head_and_body_gets_a_whole_500() -> None:
    failed = start(length(5), status=500)
    ours = await sent(OneWrite, [start(length(3), (b"x-model", b"beta")), failed, body(b"sorry")])
    assert ours == ([b"".join((await sent(RequestResponseCycle, [failed, body(b"sorry")]))[0])], "", False)
