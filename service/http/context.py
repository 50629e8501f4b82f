"""What this service knows of one request beyond ASGI: one object in its scope, made by the protocol or by the edge."""

import asyncio
from dataclasses import dataclass

from fastapi import Request
from starlette.types import Scope

from service.encoders.registry import Service
from service.encoders.served import Answer

KEY = "fullrank"  # in the scope


@dataclass(slots=True, eq=False)
class Context:
    """One request: whom it came to, how much of it is here, and what it became, for its log line and its trace."""

    service: Service
    gone: asyncio.Future[None] | None = None  # done when the client has left; None where no protocol of ours says so
    whole: bool = False  # the body is here, up to its end
    images: int = 0
    work: tuple[float, Answer] | None = None  # when embedding began, in time.monotonic() seconds, and what came of it


def context_of(scope: Scope) -> Context:
    """The request's context."""
    context: Context = scope[KEY]
    return context


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return context_of(request.scope).service
