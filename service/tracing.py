"""OpenTelemetry spans of requests, made once a request has ended, so that none waits for them."""

import os
import time
from typing import TYPE_CHECKING

from fullrank import __version__ as VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from service.encoders.served import Answer


class Tracing:
    """Spans of requests on their way to a collector; the OTEL_* variables say which and how much is sampled."""

    def __init__(self, exporter: "SpanExporter | None" = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise RuntimeError(
                f"tracing is on but {error.name} is not installed: pip install 'fullrank-server[tracing]', "
                "or set FULLRANK_TRACING=false"
            ) from error
        self._extract = propagate.extract
        self._trace = trace
        name = os.environ.get("OTEL_SERVICE_NAME", "fullrank")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": VERSION}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("fullrank", VERSION)

    def record(
        self,
        headers: dict[bytes, bytes],
        method: str,
        route: str,
        status: int,
        started: float,
        work: "tuple[float, Answer] | None",
    ) -> None:
        """A request from `started` (time.monotonic()) until now, as a child of its traceparent; `work` began when."""
        now = time.monotonic()
        wall = time.time_ns()

        def at(moment: float) -> int:
            return wall - round((now - moment) * 1e9)

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
        }
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(f"{method} {route}", self._extract(carrier), kind, attributes, None, at(started))
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        if work is not None:
            begin, answer = work
            span.set_attribute("fullrank.images", len(answer.rows))
            span.set_attribute("fullrank.model", answer.served.name)
            span.set_attribute("fullrank.revision", answer.served.revision)
            inside = self._trace.set_span_in_context(span)
            for phase in ("decode", "queue", "forward"):
                end = begin + getattr(answer, f"{phase}_seconds")
                self._tracer.start_span(phase, inside, start_time=at(begin)).end(at(end))
                begin = end
        span.end(wall)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
