"""uvicorn's HTTP protocol with bounds: on heads, on the time of each request and answer, and on connections.

By itself it keeps headers of any size, bodies that trickle in for ever, and answers that nobody reads.
"""

import asyncio
import socket
import time
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.http.context import CONTEXT, Context, Front, context_of
from service.http.errors import Problem, respond, retry

HEAD_BYTES = 64 * 2**10  # of headers beyond the first read, which is at most 256 KiB
PIPELINED = 64  # requests of one connection that wait for their turn
GRACE = 5.0  # seconds that an answer made at the last moment has to be read, and no less for any other
IDLE = 5.0  # seconds without a request after which a connection may have to make room for another
PROBE = 0.1  # seconds between two looks at whether a client that closed its side is still there
HURRY = 2.0  # seconds that a connection beyond the limit has to ask for something
# What a connection beyond the limit may still ask for, so that nobody restarts a service for being busy.
ALWAYS = (b"/healthz", b"/readyz", b"/v2/health/live", b"/v2/health/ready", b"/metrics")
TCP_CLOSE = 7  # the state of a socket whose other end has reset it


def _refusal(status: HTTPStatus, code: str, message: str, field: str = "headers") -> Problem:
    """What ends a connection for its request's head."""
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


def bounded(front: Front) -> type[HttpToolsProtocol]:
    """The protocol for uvicorn's `http`.

    - A head that is too long gets 431; one that is not whole within request_timeout of its first byte gets 408.
    - A body that nobody reads, since its request is answered, is thrown away until then, up to max_body_bytes; then
      the connection ends.
    - An answer that is not read within request_timeout of the request's first byte, or GRACE seconds of being ready,
      ends the connection.
    - Beyond max_connections an idle connection makes room, or the new one gets 503, but for health and metrics.
    - A client that closes its side after a whole request is answered all the same.
    """
    settings, metrics = front.service.settings, front.service.metrics
    seconds, limit = settings.request_timeout, settings.max_connections
    late = _refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "headers_timeout",
        f"the request line and headers did not come within {seconds:g} s, the limit; send them at once",
    )
    full = Problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "too_many_connections",
        f"{limit} connections are open, the limit; keep connections open and share them, or come again in 1 s",
        headers={"Connection": "close"} | retry(1),
    )
    searched = 0.0  # when no idle connection was found

    class Bounded(HttpToolsProtocol):
        url = b""
        _context: Context
        _timer: asyncio.TimerHandle | None = None  # for what is to come
        _flush: asyncio.TimerHandle | None = None  # for what is to be read
        _began = _idle = 0.0  # when the last request's first byte came; when the last answer was given
        _unused = 0  # bytes received since the last whole head or piece of a body
        _in_head = _in_body = _excess = _overdue = False
        _thrown_away = 0

        # ---- connections

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._gone: asyncio.Future[None] = self.loop.create_future()
            self._began = self._idle = time.monotonic()
            self._timer = self.loop.call_later(seconds, self._late)
            if len(self.connections) > limit and not self._made_room():
                self._excess = True  # it is told so once it asks, unless there are very many of its kind
                self._stop(self._timer)
                self._timer = self.loop.call_later(min(seconds, HURRY), self._late)
                if len(self.connections) > limit + limit // 4 + 16:
                    transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop(self._timer)
            self._stop(self._flush)
            for cycle, _ in self.pipeline:
                context_of(cycle.scope).release()
            self._gone.set_result(None)
            super().connection_lost(exc)

        def _made_room(self) -> bool:
            """Whether another connection that had been idle for long enough could be closed."""
            nonlocal searched
            now = time.monotonic()
            if now < searched + 1.0:
                return False
            others = (it for it in self.connections if isinstance(it, Bounded) and it is not self and it.is_idle(now))
            if (oldest := min(others, key=lambda it: it._idle, default=None)) is None:
                searched = now
                return False
            oldest.transport.abort()
            return True

        def is_idle(self, now: float) -> bool:
            """Whether it has been without a request for IDLE seconds."""
            answered = self.cycle is None or self.cycle.response_complete
            return answered and not self._unused and not self._in_body and now > self._idle + IDLE

        def timeout_keep_alive_handler(self) -> None:
            # What was never read would keep it open.
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
                self._timer = self.loop.call_later(max(0.0, began + seconds - time.monotonic()), self._late)

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
                self._refuse(full)
            elif len(self.pipeline) >= PIPELINED:
                self.transport.abort()
            if self.transport.is_closing():
                return
            peer = None if self.client is None else self.client[0]
            self._context = Context(front, peer, self._gone, self._began)
            self.scope[CONTEXT] = self._context  # type: ignore[literal-required]
            super().on_headers_complete()
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
            if self._thrown_away > settings.max_body_bytes:
                self.transport.abort()

        def on_message_complete(self) -> None:
            self._unused = 0
            self._in_body = False
            if self.transport.is_closing():
                return
            self._context.whole = True
            super().on_message_complete()

        def eof_received(self) -> bool | None:  # type: ignore[override]
            if self._in_head or self._in_body or self.cycle is None or self.cycle.response_complete:
                return None
            # Whether it closed its side only, or left, is seen when something is sent: who has left answers with a
            # reset. An interim answer does no harm, and HTTP/1.1 lets a server send one at any time.
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
            # The request is answered as any other: a line of log for each would be a stranger's to write.
            if self.cycle is not None:
                self.cycle.keep_alive = False

        # ---- answers

        def on_response_complete(self) -> None:
            self._idle = now = time.monotonic()
            if self.pipeline:  # its time begins when it is its turn
                context_of(self.pipeline[-1][0].scope).started = self._began = now
                self._stop(self._timer)
                self._timer = None if not self._in_body else self.loop.call_later(seconds, self._late)
            super().on_response_complete()
            if self.transport.is_closing():  # once it has been read
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
            """End the connection, unless what was written is read in time."""
            if self._flush is None:
                rest = max(0.0, self._began + seconds - time.monotonic())
                self._flush = self.loop.call_later(rest + GRACE, self.transport.abort)

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None and not self.cycle.response_complete and not self._in_body:
                self.cycle.keep_alive = False  # what came before is whole: it is answered, and nothing after it
                self.flow.pause_reading()
                return
            if self.cycle is not None and not self.cycle.response_started:
                self.cycle.response_complete = self.cycle.disconnected = True  # this is its answer
                self.cycle.message_event.set()
            self._unused += 1  # what was wrong may have been the last of a head
            self._refuse(NOT_HTTP)

        # ---- refusals

        def _late(self) -> None:
            """What was to come by now did not."""
            self._timer = None
            if self.transport.is_closing():
                self.transport.abort()
            elif self.cycle is None or self.cycle.response_complete:
                self._refuse(late)
            elif not self._overdue:  # the route tells the client that it is late
                self._overdue = True
                self._timer = self.loop.call_later(GRACE, self._late)
            else:
                self.transport.abort()

        def _refuse(self, problem: Problem) -> None:
            """End the connection, with an answer if one is expected: not by who asked for nothing, or is answered."""
            if self.transport.is_closing():
                return
            if (self._unused or self._in_head or self._excess) and (self.cycle is None or self.cycle.response_complete):
                answer = respond(self.url.decode("latin-1"), problem)
                lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
                self.transport.write(b"".join([STATUS_LINE[problem.status_code], *lines, b"\r\n", bytes(answer.body)]))
                metrics.requests.labels("other", str(problem.status_code)).inc()
            self._end_unread()
            self.transport.close()

        @staticmethod
        def _stop(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Bounded
