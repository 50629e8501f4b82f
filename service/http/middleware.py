"""ASGI middleware around every request: request id, body limits, counters, logs and answers to unexpected errors."""

import itertools
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.encoders.registry import Service
from service.http.bodies import reader
from service.http.context import context_of
from service.http.errors import CLIENT_CLOSED_REQUEST, internal_error, respond
from service.tracing import Tracing

log = logging.getLogger("fullrank.service")
# Request ids are a random prefix and a counter: a call of urandom for each would hand the GIL to another thread.
PROCESS = secrets.token_hex(8).encode()
NUMBERS = itertools.count(1)
SANE_ID = re.compile(rb"[\w.:/+=-]{1,128}")


class Edge:
    """The outermost middleware, in plain ASGI: Starlette's BaseHTTPMiddleware costs more than the routes it wraps."""

    def __init__(self, app: ASGIApp, service: Service, tracing: Tracing | None = None) -> None:
        self.app = app
        self.service = service
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST
        context = context_of(scope)
        context.headers = headers = dict([*scope["headers"]][::-1])
        identity = headers.get(b"x-request-id", b"")
        if not identity or not SANE_ID.fullmatch(identity):
            identity = b"%s%08x" % (PROCESS, next(NUMBERS))
        logs.request_id.set(identity.decode())
        method: str = scope["method"]
        if method == "HEAD":  # HEAD is answered as GET; the server leaves the body out
            scope = {**scope, "method": "GET", "fullrank.head": True}

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                if self.service.phase in ("draining", "stopped"):
                    message["headers"].append((b"connection", b"close"))
            elif method == "HEAD":
                message["body"] = b""
            await send(message)

        try:
            await self.app(scope, reader(context, scope["path"], headers, receive), observed_send)
        except Exception:
            log.exception("%s %s failed", method, scope["path"])
            if status != CLIENT_CLOSED_REQUEST:
                raise
            await respond(scope["path"], internal_error())(scope, receive, observed_send)
        finally:
            # The route's template, never the raw path: otherwise clients could create any number of series.
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - context.started
            self.service.metrics.count_request(route, status, seconds)
            if self.service.settings.access_log:
                logs.log_access(method, route, status, seconds, context.images)
            if self.tracing is not None:
                self.tracing.record(headers, method, route, status, context.started, context.work)
