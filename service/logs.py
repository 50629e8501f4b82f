"""Log formats: text for people or JSON lines for machines. Every line, uvicorn's too, has the id of its request."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

access = logging.getLogger("fullrank.access")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class TextFormatter(logging.Formatter):
    """`INFO:     message [request id]`."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s:     %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        identity = request_id.get()
        return super().formatMessage(record) + (f" [{identity}]" if identity else "")


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: time, level, logger, message, and request_id, exception and fields if any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (identity := request_id.get()) is not None:
            line["request_id"] = identity
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(form: Literal["text", "json"]) -> None:
    """Write all logs of this process to standard error in one form, unless the host program has set up logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_access(method: str, route: str, code: int, seconds: float, images: int) -> None:
    """Log one line for a request that has been answered."""
    fields = {"method": method, "route": route, "code": code, "seconds": round(seconds, 6), "images": images}
    message = "%s %s %d in %.1f ms, %d images"
    access.info(message, method, route, code, seconds * 1e3, images, extra={"fields": fields})
