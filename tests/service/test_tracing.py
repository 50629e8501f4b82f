"""Spans of a request: exported, with its phases inside, under its caller's; and what is said where nothing can be."""

import sys
import time
from collections.abc import Callable

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.http.app import create_app
from service.settings import Settings
from service.tracing import Tracing
from tests.support.images import as_files, encoded, pictures

IMAGES = [encoded(picture) for picture in pictures(3)]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.anyio
async def test_the_phases_of_a_request_are_spans_under_its_callers(settings: Callable[..., Settings]) -> None:
    exporter = InMemorySpanExporter()
    app = create_app(settings(), tracing=Tracing(exporter))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://it") as client:
        while (await client.get("/readyz")).status_code != 200:
            pass
        before = time.time_ns()
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert (await client.post("/embed", files=as_files(IMAGES), headers=headers)).status_code == 200
        assert (await client.post("/embed", files=as_files([b"bad"]))).status_code == 422
        app.state.service.current.embed = lambda pixels: 1 / 0
        assert (await client.post("/embed", files=as_files(IMAGES))).status_code == 500
        after = time.time_ns()
    spans = exporter.get_finished_spans()
    mine = {span.name: span for span in spans if f"{span.context.trace_id:032x}" == TRACE}
    assert set(mine) == {"POST /embed", "decode", "queue", "forward"}
    request = mine["POST /embed"]
    assert (request.kind, f"{request.parent.span_id:016x}") == (SpanKind.SERVER, PARENT)
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "fullrank.images": 3,
        "fullrank.model": "alpha",
        "fullrank.revision": app.state.service.current.revision,
    }
    phases = [mine[name] for name in ("decode", "queue", "forward")]
    assert {span.parent.span_id for span in phases} == {request.context.span_id}
    times = [before, request.start_time, *(t for span in phases for t in (span.start_time, span.end_time))]
    assert times == sorted(times)
    assert phases[-1].end_time <= request.end_time <= after
    assert phases[-1].end_time > phases[-1].start_time
    failed = [span for span in spans if span.attributes.get("http.response.status_code") == 500]
    assert [span.status.status_code for span in failed] == [StatusCode.ERROR]
    refused = [span for span in spans if span.attributes.get("http.response.status_code") == 422]
    assert [span.status.status_code for span in refused] == [StatusCode.UNSET]


def test_without_the_extra_it_is_said_only_where_it_is_switched_on(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.setitem(sys.modules, name, None)
    create_app(settings())
    with pytest.raises(RuntimeError, match=r"pip install 'fullrank-server\[tracing\]'"):
        create_app(settings(tracing=True))
