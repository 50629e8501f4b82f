"""uvicorn's HTTP protocol with limits on headers, on the time of each request and answer, and on connections.

Without them uvicorn accepts headers of any size, waits for ever for slow bodies, and keeps answers that nobody reads.
"""

import asyncio
import socket
import time
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.http.context import CONTEXT, Context, Front, context_of
from service.http.errors import Problem, respond, retry
from service.http.sending import OneWrite

HEAD_BYTES = 64 * 2**10  # bytes of headers, beyond the first read of at most 256 KiB
PIPELINED = 64  # requests of one connection that may wait for their turn
GRACE = 5.0  # seconds that a client has at least to read an answer
IDLE = 5.0  # seconds without a request after which a connection may be closed to make room
PROBE = 0.1  # seconds between two checks whether a client that closed its side is still there
UNUSED = 2.0  # seconds in which a connection beyond the limit must send a request
# Paths that a connection beyond the limit may still ask for, so that a busy service is not restarted as dead.
ALWAYS = (b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready", b"/metrics")
TCP_CLOSE = 7  # state of a socket that the other end has reset


def _refusal(status: HTTPStatus, code: str, message: str, field: str = "headers") -> Problem:
    """The answer to a bad request head. It closes the connection."""
    return Problem(status, code, message, field=field, headers={"Connection": "close"})


TOO_LARGE = _refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "headers_too_large",
    f"the request line and headers are longer than {HEAD_BYTES} bytes, the limit; send fewer or shorter headers",
)
NOT_HTTP = _refusal(
    HTTPStatus.BAD_REQUEST,
    "malformed_request",
    "what came is no HTTP/1.1 request; send one as RFC 9112 has it",
    "request",
)


class Limits:
    """The limits that all connections of one service share, and the refusals that name them.

    searched: when a search last found no idle connection.
    """

    def __init__(self, front: Front) -> None:
        settings = front.service.settings
        self.front = front
        self.seconds = settings.request_timeout
        self.connections = settings.max_connections
        self.most_connections = settings.max_connections + settings.max_connections // 4 + 16
        self.body_bytes = settings.max_body_bytes
        self.searched = 0.0
        self.late = _refusal(
            HTTPStatus.REQUEST_TIMEOUT,
            "headers_timeout",
            f"the request line and headers did not come within {self.seconds:g} s, the limit; send them at once",
        )
        self.full = Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "too_many_connections",
            f"{self.connections} connections are open, the limit; keep connections open and share them, or come again "
            "in 1 s",
            headers={"Connection": "close"} | retry(1),
        )


class Bounded(HttpToolsProtocol):
    """One connection within the limits. `bounded` makes the subclass that knows the settings.

    - A request head that is too long gets 431. One that is not complete within request_timeout of its first byte gets
      408.
    - The rest of a body whose request is answered already is thrown away, up to max_body_bytes. Beyond that the
      connection is closed.
    - If an answer is not read within request_timeout of the request's first byte, nor GRACE seconds after it was ready,
      the connection is closed.
    - Beyond max_connections an idle connection is closed to make room. If none is idle, the new one gets 503, except
      for health and metrics.
    - A client that closes its sending side after a whole request still gets its answer.
    """

    limits: ClassVar[Limits]
    url = b""
    _context: Context
    _timer: asyncio.TimerHandle | None = None  # deadline for what the client must send
    _flush: asyncio.TimerHandle | None = None  # deadline for what the client must read
    _began = _idle = 0.0  # when the last request's first byte came; when the last answer was complete
    _unused = 0  # bytes received since the last complete head or piece of a body
    _in_head = _in_body = _excess = _overdue = False
    _thrown_away = 0

    # ---- connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._began = self._idle = time.monotonic()
        self._timer = self.loop.call_later(self.limits.seconds, self._late)
        if len(self.connections) > self.limits.connections and not self._made_room():
            self._excess = True  # it gets 503 once it sends a request, unless there are very many like it
            self._stop(self._timer)
            self._timer = self.loop.call_later(min(self.limits.seconds, UNUSED), self._late)
            if len(self.connections) > self.limits.most_connections:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._timer)
        self._stop(self._flush)
        for cycle, _ in self.pipeline:
            context_of(cycle.scope).release()
        self._gone.set_result(None)
        super().connection_lost(exc)

    def _made_room(self) -> bool:
        """Close the connection that has been idle longest; False if none was idle for long enough."""
        now = time.monotonic()
        if now < self.limits.searched + 1.0:
            return False
        others = (it for it in self.connections if isinstance(it, Bounded) and it is not self and it.is_idle(now))
        if (oldest := min(others, key=lambda it: it._idle, default=None)) is None:
            self.limits.searched = now
            return False
        oldest.transport.abort()
        return True

    def is_idle(self, now: float) -> bool:
        """Whether the connection has had no request for IDLE seconds."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self._unused and not self._in_body and now > self._idle + IDLE

    def timeout_keep_alive_handler(self) -> None:
        # abort, not close: data that the client never read would keep it open.
        self.transport.abort()

    # ---- requests

    def data_received(self, data: bytes) -> None:
        self._unused += len(data)
        super().data_received(data)
        if not (self._unused or self._in_head or self._in_body):
            self._stop(self._timer)
            self._timer = None
        elif self._unused > HEAD_BYTES:
            self._refuse(TOO_LARGE)
        elif self._timer is None:
            began = self._began if self._in_head or self._in_body else time.monotonic()
            self._timer = self.loop.call_later(max(0.0, began + self.limits.seconds - time.monotonic()), self._late)

    def on_message_begin(self) -> None:
        self._began = time.monotonic()
        self._in_head = True
        self._overdue = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._unused = 0
        self._in_head = False
        self._in_body = True
        self._thrown_away = 0
        if self._excess and self.url.partition(b"?")[0] not in ALWAYS:
            self._refuse(self.limits.full)
        elif len(self.pipeline) >= PIPELINED:
            self.transport.abort()
        if self.transport.is_closing():
            return
        peer = None if self.client is None else self.client[0]
        self._context = Context(self.limits.front, peer, self._gone, self._began)
        self.scope[CONTEXT] = self._context  # type: ignore[literal-required]
        super().on_headers_complete()
        self.cycle.__class__ = OneWrite  # uvicorn has no option for the class of its cycles
        if self._excess:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unused = 0
        if self.transport.is_closing():
            return
        if not self.cycle.response_complete:
            self._context.hold(len(body))
            super().on_body(body)
            return
        self._thrown_away += len(body)
        if self._thrown_away > self.limits.body_bytes:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self._unused = 0
        self._in_body = False
        if self.transport.is_closing():
            return
        self._context.whole = True
        self._context.body = self.cycle.body
        super().on_message_complete()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._in_head or self._in_body or self.cycle is None or self.cycle.response_complete:
            return None
        # To tell a client that closed only its sending side from one that has left, something must be sent: one
        # that has left answers with a reset. HTTP/1.1 lets a server send an interim answer at any time.
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.1" and not self.cycle.response_started and not self.pipeline:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(PROBE, self._probe)
        return True

    def _probe(self) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        end = self.transport.get_extra_info("socket")
        if hasattr(socket, "TCP_INFO") and end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self.transport.abort()
        else:
            self.loop.call_later(PROBE, self._probe)

    def _unsupported_upgrade_warning(self) -> None:
        # No log line: the request is answered like any other, and anybody could fill the log with such requests.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # ---- answers

    def on_response_complete(self) -> None:
        self._idle = now = time.monotonic()
        if self.pipeline:  # the time of a pipelined request begins with its turn
            context_of(self.pipeline[-1][0].scope).started = self._began = now
            self._stop(self._timer)
            self._timer = None if not self._in_body else self.loop.call_later(self.limits.seconds, self._late)
        super().on_response_complete()
        if self.transport.is_closing():  # it closes once the answer has been read
            self._end_unread()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop(self._flush)
            self._flush = None

    def _end_unread(self) -> None:
        """Close the connection if the client does not read what was written in time."""
        if self._flush is None:
            rest = max(0.0, self._began + self.limits.seconds - time.monotonic())
            self._flush = self.loop.call_later(rest + GRACE, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete and not self._in_body:
            self.cycle.keep_alive = False  # the request before the bad one is whole: answer it, and nothing after
            self.flow.pause_reading()
            return
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.response_complete = self.cycle.disconnected = True  # this is its answer
            self.cycle.message_event.set()
        self._unused += 1  # so that it counts as asked, even if the bad byte was the last of a head
        self._refuse(NOT_HTTP)

    # ---- refusals

    def _late(self) -> None:
        """The client missed the deadline of _timer."""
        self._timer = None
        if self.transport.is_closing():
            self.transport.abort()
        elif self.cycle is None or self.cycle.response_complete:
            self._refuse(self.limits.late)
        elif not self._overdue:  # first let the route answer that it is late
            self._overdue = True
            self._timer = self.loop.call_later(GRACE, self._late)
        else:
            self.transport.abort()

    def _refuse(self, problem: Problem) -> None:
        """Close the connection, with an answer if a request has begun and has none yet."""
        if self.transport.is_closing():
            return
        if (self._unused or self._in_head or self._excess) and (self.cycle is None or self.cycle.response_complete):
            answer = respond(self.url.decode("latin-1"), problem)
            lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
            self.transport.write(b"".join([STATUS_LINE[problem.status_code], *lines, b"\r\n", bytes(answer.body)]))
            self.limits.front.service.metrics.requests.labels("other", str(problem.status_code)).inc()
        self._end_unread()
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def bounded(front: Front) -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn's option `http`: `Bounded` with this service's limits."""
    return type("Bounded", (Bounded,), {"limits": Limits(front)})
