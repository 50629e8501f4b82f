"""uvicorn's HTTP parser, bounded before a request's body: by itself it keeps headers of any size, for any time."""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.encoders.registry import Service
from service.http.context import KEY, Context
from service.http.errors import Problem, respond

HEAD_BYTES = 64 * 2**10  # of headers beyond the first read, which is at most 256 KiB


def _refusal(status: HTTPStatus, code: str, message: str) -> Problem:
    """What ends a connection for its request's head."""
    return Problem(status, code, message, field="headers", headers={"Connection": "close"})


TOO_LARGE = _refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "headers_too_large",
    f"the request line and headers are longer than {HEAD_BYTES} bytes, the limit; send fewer or shorter headers",
)


def bounded(service: Service) -> type[HttpToolsProtocol]:
    """The protocol for uvicorn's `http`: headers too long get 431, those not whole within request_timeout get 408.

    Without the first, one header of 100 MB, which is appended to as it arrives, holds up everybody else for many
    seconds; without the second, sockets that never ask for anything are kept for ever.
    """
    seconds = service.settings.request_timeout
    late = _refusal(
        HTTPStatus.REQUEST_TIMEOUT,
        "headers_timeout",
        f"the request line and headers did not come within {seconds:g} s, the limit; send them at once",
    )

    class Bounded(HttpToolsProtocol):
        url = b""
        _timer: asyncio.TimerHandle | None = None
        _unused = 0  # bytes received since the last whole head or piece of a body

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._gone: asyncio.Future[None] = self.loop.create_future()
            self._timer = self.loop.call_later(seconds, self._refuse, late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._used()
            self._gone.set_result(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._unused += len(data)
            super().data_received(data)
            if not self._unused:
                return
            if self.cycle is not None and not self.cycle.more_body and "method" in self.scope:
                self._used()  # the end of a body in chunks
            elif self._unused > HEAD_BYTES:
                self._refuse(TOO_LARGE)
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self._refuse, late)

        def on_headers_complete(self) -> None:
            self._used()
            self._context = Context(service, self._gone)
            self.scope[KEY] = self._context  # type: ignore[literal-required]
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._used()
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._context.whole = True
            super().on_message_complete()

        def _used(self) -> None:
            self._unused = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, problem: Problem) -> None:
            if self.transport.is_closing():
                return
            # Nobody who has asked for nothing yet, or who is being answered, expects this.
            if self._unused and (self.cycle is None or self.cycle.response_complete):
                answer = respond(self.url.decode("latin-1"), problem)
                lines = [b"%s: %s\r\n" % header for header in answer.raw_headers]
                self.transport.write(b"".join([STATUS_LINE[problem.status_code], *lines, b"\r\n", bytes(answer.body)]))
                service.metrics.requests.labels("other", str(problem.status_code)).inc()
            self.transport.close()

    return Bounded
