"""The edge every request passes: body limit while it streams, counters, a last resort for unexpected exceptions."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core import Service
from service.errors import CLIENT_CLOSED_REQUEST, Problem, internal_error

log = logging.getLogger("fullrank.service")


class Edge:
    """Pure ASGI: a BaseHTTPMiddleware would cost more than the routes it wraps."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), CLIENT_CLOSED_REQUEST

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.service.phase in ("draining", "stopped"):
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self.app(scope, bounded(scope, receive, self.service.settings.max_body_bytes), observed_send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if status != CLIENT_CLOSED_REQUEST:
                raise
            await internal_error()(scope, receive, observed_send)
        finally:
            # The template, never the raw path: one series per route however inventive the clients.
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.request_seconds.labels(route).observe(time.monotonic() - started)


def bounded(scope: Scope, receive: Receive, limit: int) -> Receive:
    """`receive` that raises Problem 413 once a body is, or says it will be, longer than `limit` bytes."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    length = int(declared) if declared.isdigit() else 0
    received = 0

    async def bounded_receive() -> Message:
        nonlocal received
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
