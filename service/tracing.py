"""OpenTelemetry spans of requests. They are made after a request has ended, so that no request waits for them."""

import os
import time
from typing import TYPE_CHECKING

from fullrank import __version__ as VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from service.encoders.served import Answer


class Tracing:
    """Sends spans of requests to a collector. The OTEL_* variables configure the collector and the sampling."""

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
        """Record a span from `started` (time.monotonic()) until now, as a child of the request's traceparent.

        work: when embedding began, and its answer; None if nothing was embedded.
        """
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
        """Send the spans that are left."""
        self._provider.shutdown()
