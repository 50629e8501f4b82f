"""Sends an answer's head and body in one write.

uvicorn writes the head when it gets it, then the body. Each is a system call, and each wakes the client.
"""

from typing import Any, cast

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle

START, BODY = "http.response.start", "http.response.body"
SPECIAL = (b"connection", b"transfer-encoding")


class OneWrite(RequestResponseCycle):
    """A request whose answer's head waits for its body, if it says how long that is.

    What is unusual goes uvicorn's own way: an answer in pieces, the last one on a connection, one to a slow reader.
    """

    _head: Message | None = None

    async def send(self, message: Any) -> None:
        """Take a message of ASGI's."""
        head = self._head
        if message["type"] == START and not self.response_started and _has_length(message):
            self._head = message  # in place of one that waits, if the route failed before its body
            return
        if head is not None:
            self._head = None
            if self._sent(head, message):
                return
            await super().send(cast(Any, head))
        await super().send(message)

    def _sent(self, head: Message, message: Message) -> bool:
        """Send a whole answer; False, and nothing is sent, if it is not of the usual kind."""
        body = message.get("body", b"")
        if message.get("more_body", False) or not self.keep_alive or self.scope["method"] == "HEAD":
            return False
        if message["type"] != BODY or self.disconnected or self.flow.write_paused:
            return False
        length = b"%d" % len(body)
        headers = [*self.default_headers, *head["headers"]]
        names, values = zip(*headers, strict=True)
        if HEADER_RE.search(b"".join(names)) or HEADER_VALUE_RE.search(b"".join(values)):
            return False
        lines = [STATUS_LINE[head["status"]]]
        for spelled, value in headers:
            name = spelled.lower()
            if name in SPECIAL or (name == b"content-length" and value != length):
                return False
            lines += name, b": ", value, b"\r\n"
        lines += b"\r\n", body
        self.response_started = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join(lines))
        self.response_complete = True
        self.message_event.set()
        self.on_response()
        return True


def _has_length(message: Message) -> bool:
    return any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
