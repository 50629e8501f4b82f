"""POST /embed: images in, embeddings out."""

import asyncio
import math
import time
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.encoders.served import Answer, Source
from service.failures import DeadlineError
from service.http import payload
from service.http.access import Embedding, client_of
from service.http.bodies import body_timeout
from service.http.context import context_of, header_of, service_of
from service.http.errors import Problem, client_closed
from service.http.routes.schemas import EMBED_BODY, EMBED_RESPONSES

router = APIRouter(tags=["embeddings"], route_class=Embedding)
T = TypeVar("T")


@router.post("/embed", openapi_extra=EMBED_BODY, responses=EMBED_RESPONSES, response_class=Response)
async def embed(request: Request) -> Response:
    """Embed one image (the body) or many (multipart `images`, JSON with base64), L2-normalised unless asked otherwise.

    Answers JSON, or by `Accept` a .npy file or bare little-endian float32 with its shape in `X-Shape`. All rows come
    from one revision of one encoder, which the answer names. `X-Request-Timeout` (seconds) shortens the deadline after
    which the work is dropped.
    """
    service = service_of(request)
    deadline = deadline_of(request, service.settings.request_timeout)
    form = payload.accepted(header_of(request, b"accept") or "")
    asked = await read_by(request, deadline, payload.read(request, service.settings))
    answer = await embedded(request, asked.sources, deadline, asked.model)
    started = time.monotonic()
    response = payload.encode(answer, asked, form)
    service.metrics.phase["encode"].observe(time.monotonic() - started)
    return response


async def embedded(request: Request, sources: Sequence[Source], deadline: float, model: str | None = None) -> Answer:
    """Embed a request's images, and note the work in its context for the log line and the trace.

    The work is dropped if the client leaves. Only our own protocol (limits.py) reports that; behind another server the
    work is finished.
    """
    context = context_of(request.scope)
    context.images = len(sources)
    started = time.monotonic()
    work = asyncio.current_task()
    waiting = True
    left = False
    assert work is not None

    def leave(_: object) -> None:
        nonlocal left
        if waiting:
            left = work.cancel()

    if context.gone is not None:
        context.gone.add_done_callback(leave)
    try:
        answer = await context.service.embed(
            sources, deadline, model, client_deadline=context.client_deadline, client=client_of(request)
        )
    except DeadlineError:
        if not context.client_deadline:
            raise
        message = "the request's own deadline, X-Request-Timeout or its like, passed before its images were embedded"
        raise Problem(408, "client_deadline", message, field="X-Request-Timeout") from None
    except asyncio.CancelledError:
        if left and not work.uncancel():
            raise client_closed() from None
        raise
    finally:
        waiting = False
        if context.gone is not None:
            context.gone.remove_done_callback(leave)
    context.work = started, answer
    return answer


async def read_by(request: Request, deadline: float, reading: Awaitable[T]) -> T:
    """Read what a client sends, until the deadline. Raises Problem 408 if it is too slow, 499 if it leaves."""
    try:
        if context_of(request.scope).whole:
            return await reading  # the body has arrived: this does not wait
        async with asyncio.timeout(deadline - time.monotonic()):
            return await reading
    except TimeoutError:
        raise body_timeout() from None


def deadline_of(request: Request, longest: float) -> float:
    """The request's deadline in time.monotonic() seconds. Raises Problem 422.

    It is X-Request-Timeout seconds after the request's first byte, at most `longest`.
    """
    context = context_of(request.scope)
    seconds = longest
    if (text := header_of(request, b"x-request-timeout")) is not None:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise Problem(
                422,
                "invalid_field",
                f"X-Request-Timeout must be seconds above 0, not {text!r}",
                field="X-Request-Timeout",
            )
        context.client_deadline = seconds < longest
    return context.started + min(seconds, longest)
