"""The edge every request passes: its id, the body's limit while it streams, counters, logs, a last resort."""

import itertools
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.encoders.registry import Service
from service.http.context import KEY, Context
from service.http.errors import CLIENT_CLOSED_REQUEST, Problem, internal_error, respond
from service.tracing import Tracing

log = logging.getLogger("fullrank.service")
# Random once, counted after: each call of urandom would hand the GIL to another thread.
PROCESS, NUMBERS = secrets.token_hex(8).encode(), itertools.count(1)
SANE_ID = re.compile(rb"[\w.:/+=-]{1,128}")


class Edge:
    """Pure ASGI: a BaseHTTPMiddleware would cost more than the routes it wraps."""

    def __init__(self, app: ASGIApp, service: Service, tracing: Tracing | None = None) -> None:
        self.app, self.service, self.tracing = app, service, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), CLIENT_CLOSED_REQUEST
        if KEY not in scope:  # behind another server, or in a test
            scope[KEY] = Context(self.service)
        context: Context = scope[KEY]
        headers = dict(scope["headers"])
        identity = headers.get(b"x-request-id", b"")
        if not identity or not SANE_ID.fullmatch(identity):
            identity = b"%s%08x" % (PROCESS, next(NUMBERS))
        logs.request_id.set(identity.decode())

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                if self.service.phase in ("draining", "stopped"):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            limited = bounded(headers, receive, self.service.settings.max_body_bytes)
            await self.app(scope, limited, observed_send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if status != CLIENT_CLOSED_REQUEST:
                raise
            await respond(scope["path"], internal_error())(scope, receive, observed_send)
        finally:
            # The template, never the raw path: one series per route however inventive the clients.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            self.service.metrics.answered(route, status, seconds)
            if self.service.settings.access_log:
                logs.log_access(scope["method"], route, status, seconds, context.images)
            if self.tracing is not None:
                self.tracing.record(headers, scope["method"], route, status, started, context.work)


def bounded(headers: dict[bytes, bytes], receive: Receive, limit: int) -> Receive:
    """`receive` that raises Problem 413 once a body is, or says it will be, longer than `limit` bytes; 415 if packed.

    A packed body is refused rather than unpacked: a few kilobytes can hold gigabytes, and images are packed already.
    """
    declared = headers.get(b"content-length", b"")
    length = int(declared) if declared.isdigit() else 0
    packed = headers.get(b"content-encoding", b"identity").lower()
    if declared.isdigit() and length <= limit and packed == b"identity" and b"transfer-encoding" not in headers:
        return receive  # the server holds a body to the length it declares
    received = 0

    async def bounded_receive() -> Message:
        nonlocal received
        if packed != b"identity":
            reason = f"Content-Encoding {packed.decode('latin-1')!r} is not understood; send the body as it is"
            raise Problem(415, "unsupported_content_encoding", reason, field="Content-Encoding")
        message: dict[str, Any] = {}
        if length <= limit:
            message = dict(await receive())
            received += len(message.get("body", b""))
        if max(length, received) > limit:
            raise Problem(
                413,
                "body_too_large",
                f"the body is longer than {limit} bytes, the limit; send fewer or smaller images",
                field="body",
            )
        return message

    return bounded_receive
