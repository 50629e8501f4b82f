"""The context of one request: an object in its ASGI scope, made by the HTTP protocol (limits.py) or by the app."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from service.encoders.registry import Service
from service.encoders.served import Answer
from service.keys import Grant

CONTEXT = "fullrank"  # key of the context in the ASGI scope


class Bodies:
    """Counts bytes of request bodies in memory, over all connections. Only the event loop uses it: no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


@dataclass(frozen=True)
class Front:
    """The objects that all requests share."""

    service: Service
    bodies: Bodies
    grants: Sequence[Grant]


@dataclass(slots=True, eq=False)
class Context:
    """The state of one request: how much of it has arrived, and its result, for the log line and the trace.

    Times are in time.monotonic() seconds.
    """

    front: Front
    peer: str | None  # the address at the other end of the connection, whatever a header says
    gone: asyncio.Future[None] | None = None  # done when the client has left; None behind a server other than ours
    started: float = field(default_factory=time.monotonic)  # when its first byte came
    whole: bool = False  # whether the whole body has arrived
    held: int = 0  # bytes of its body that are counted in front.bodies
    client_deadline: bool = False  # whether the client set a deadline that is before ours
    images: int = 0
    work: tuple[float, Answer] | None = None  # when embedding began, and its answer
    headers: Mapping[bytes, bytes] = field(default_factory=dict)  # by name in lower case; the first of each
    body: bytearray | None = None  # the body, once it is whole, until somebody takes it
    at_hand: bool = False  # whether the body was whole and within the limits when the route began

    @property
    def service(self) -> Service:
        """The service that the request came to."""
        return self.front.service

    @property
    def deadline(self) -> float:
        """The time by which the whole request must have arrived and its answer must be ready."""
        return self.started + self.front.service.settings.request_timeout

    def hold(self, size: int) -> None:
        """Count bytes of the body as held in memory."""
        self.held += size
        self.front.bodies.held += size

    def release(self) -> None:
        """Count the body as no longer in memory."""
        self.front.bodies.held -= self.held
        self.held = 0


def context_of(scope: Mapping[str, object]) -> Context:
    """The request's context."""
    context = scope[CONTEXT]
    assert isinstance(context, Context)
    return context


def header_of(request: Request, name: bytes) -> str | None:
    """A header of the request, by its name in lower case. Request.headers would search a list each time."""
    value = context_of(request.scope).headers.get(name)
    return None if value is None else value.decode("latin-1")


async def body_of(request: Request) -> bytes:
    """The request's body. Call it once, in place of Request.body, which goes through three more coroutines."""
    context = context_of(request.scope)
    if not context.at_hand or context.body is None:
        return await request.body()
    content = bytes(context.body)
    context.body.clear()
    context.body = None
    return content


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return context_of(request.scope).service
