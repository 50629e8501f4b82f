"""Reads request bodies, with limits on their size, their time and the memory of all bodies together."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive

from service.http.context import Context
from service.http.errors import Problem, client_closed, retry
from service.settings import Settings

SMALL = 8 * 2**10  # longest body, in bytes, of a route that takes no images and no rows
FREE = 64 * 2**10  # bytes that each body may hold even if the limit on all bodies is reached
LARGE = ("/embed", "/v1/embeddings", "/observe", "/neighbours")  # routes that take images or rows


def limit_of(path: str, settings: Settings) -> int:
    """The longest body, in bytes, that may be sent to a path."""
    large = path in LARGE or path.startswith(("/v2/models/", "/admin/references/"))
    return settings.max_body_bytes if large else SMALL


def reader(context: Context, path: str, headers: Mapping[bytes, bytes], receive: Receive) -> Receive:
    """Wrap ASGI's `receive` so that it enforces the limits. It raises Problem with one of these statuses:

    413 if a body is, or declares to be, longer than its route allows. 415 if it has a Content-Encoding: a few kilobytes
    can unpack to gigabytes, and images are compressed already. 408 past the deadline. 429 if too many bytes are held.
    499 if the client leaves before the body's end.
    """
    settings = context.service.settings
    limit = limit_of(path, settings)
    declared = headers.get(b"content-length", b"")
    length = int(declared) if declared.isdigit() and len(declared) < 20 else 0
    packed = headers.get(b"content-encoding", b"identity").lower()
    chunked = b"transfer-encoding" in headers
    if context.whole and context.held <= FREE and length <= limit and packed == b"identity" and not chunked:
        context.at_hand = True
        return receive  # the usual case: the whole body is here, and uvicorn enforces the declared length
    received = 0
    more = True

    async def bounded() -> Message:
        nonlocal received, more
        if packed != b"identity":
            reason = f"Content-Encoding {packed.decode('latin-1')!r} is not understood; send the body as it is"
            raise Problem(415, "unsupported_content_encoding", reason, field="Content-Encoding")
        if length > limit:
            raise _too_large(limit)
        message = await _next(context, receive) if more else await receive()
        if message["type"] == "http.disconnect":
            if more:
                raise client_closed()
            return message
        received += (size := len(message.get("body", b"")))
        more = message.get("more_body", False)
        if context.gone is None:  # otherwise the protocol has counted it
            context.hold(size)
        if received > limit:
            raise _too_large(limit)
        if (held := context.front.bodies).held > held.limit and context.held > FREE:
            raise Problem(
                429,
                "overloaded",
                f"bodies of {held.held} bytes are held and at most {held.limit} may be; send this one again in 1 s",
                headers=retry(1),
            )
        return message

    return bounded


async def _next(context: Context, receive: Receive) -> dict[str, Any]:
    if context.whole:
        return dict(await receive())
    try:
        async with asyncio.timeout(context.deadline - time.monotonic()):
            return dict(await receive())
    except TimeoutError:
        raise body_timeout() from None


def body_timeout() -> Problem:
    """The answer to a body that came too slowly."""
    message = "the body did not arrive before the deadline"
    headers = {"Connection": "close"}
    return Problem(408, "body_timeout", message, field="body", headers=headers)


def _too_large(limit: int) -> Problem:
    message = f"the body is longer than {limit} bytes, the limit; send fewer or smaller images"
    return Problem(413, "body_too_large", message, field="body")
