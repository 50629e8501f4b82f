"""What this service knows of one request beyond ASGI: one object in its scope, made by the protocol or by the app."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from service.encoders.registry import Service
from service.encoders.served import Answer
from service.keys import Grant

CONTEXT = "fullrank"  # its key in the scope


class Bodies:
    """The bytes of request bodies that are held, over all connections. Used from the event loop only, hence no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


@dataclass(frozen=True)
class Front:
    """What all requests share."""

    service: Service
    bodies: Bodies
    grants: Sequence[Grant]


@dataclass(slots=True, eq=False)
class Context:
    """One request: whom it came to, how much of it is here, and what it became, for its log line and its trace.

    Times are in time.monotonic() seconds.
    """

    front: Front
    peer: str | None  # the address at the other end of the connection, whatever a header says
    gone: asyncio.Future[None] | None = None  # done when the client has left; None where no protocol of ours says so
    started: float = field(default_factory=time.monotonic)  # its first byte came
    whole: bool = False  # the body is here, up to its end
    held: int = 0  # bytes of its body, counted in front.bodies
    hurried: bool = False  # the client set itself a deadline, and it is before ours
    images: int = 0
    work: tuple[float, Answer] | None = None  # when embedding began and what came of it

    @property
    def service(self) -> Service:
        """The service that the request came to."""
        return self.front.service

    @property
    def deadline(self) -> float:
        """When the whole request must be here, and its answer made."""
        return self.started + self.front.service.settings.request_timeout

    def hold(self, size: int) -> None:
        """Count bytes of the body that are kept."""
        self.held += size
        self.front.bodies.held += size

    def release(self) -> None:
        """The body is kept no more."""
        self.front.bodies.held -= self.held
        self.held = 0


def context_of(scope: Mapping[str, object]) -> Context:
    """The request's context."""
    context = scope[CONTEXT]
    assert isinstance(context, Context)
    return context


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return context_of(request.scope).service
