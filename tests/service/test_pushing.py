"""Metrics pushed by OTLP: a receiver that parses the protobuf finds what /metrics shows, by the same names."""

import logging
import math
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.parser import text_string_to_metric_families

from service.http.app import create_app
from service.pushing import Pushing
from service.settings import Settings
from tests.support.images import as_files, encoded, pictures

Pushes = queue.Queue[ExportMetricsServiceRequest]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pushes]:
    """A real OTLP/HTTP receiver on this machine, to which the environment points."""
    received: Pushes = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["Content-Type"]) == ("/v1/metrics", "application/x-protobuf")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            received.put(ExportMetricsServiceRequest.FromString(body))

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "3600000")
        yield received
        server.shutdown()
        thread.join()


def metrics_of(push: ExportMetricsServiceRequest) -> dict[str, Any]:
    [resource] = push.resource_metrics
    [scope] = resource.scope_metrics
    found = {it.name: it for it in scope.metrics}
    assert len(found) == len(scope.metrics)
    return found


def labels(point: Any) -> dict[str, str]:
    return {it.key: it.value.string_value for it in point.attributes}


def test_each_kind_of_metric_keeps_its_name_and_value(collector: Pushes) -> None:
    registry = CollectorRegistry()
    counter = Counter("things", "Counted.", ["kind"], registry=registry)
    counter.labels("a").inc(3)
    counter.labels("b").inc(0.5)
    Gauge("depth", "Now.", registry=registry).set(math.nan)
    seconds = Histogram("work_seconds", "How long.", ["route"], buckets=(1, 5), registry=registry)
    for value in (0.5, 2, 3, 99):
        seconds.labels("/x").observe(value)
    Info("build", "Versions.", registry=registry).info({"version": "1"})
    pushing = Pushing(registry)
    pushing.start()
    pushing.close()
    found = metrics_of(collector.get(timeout=60))
    assert set(found) == {"things", "depth", "work_seconds", "build_info"}
    things = found["things"].sum
    assert things.is_monotonic
    assert things.aggregation_temporality == 2  # cumulative
    assert {labels(it)["kind"]: it.as_double for it in things.data_points} == {"a": 3, "b": 0.5}
    created = registry.get_sample_value("things_created", {"kind": "a"})
    assert created is not None
    assert things.data_points[0].start_time_unix_nano == pytest.approx(created * 1e9)
    assert math.isnan(found["depth"].gauge.data_points[0].as_double)
    [histogram] = found["work_seconds"].histogram.data_points
    assert (list(histogram.bucket_counts), list(histogram.explicit_bounds)) == ([1, 2, 1], [1, 5])
    assert (histogram.count, histogram.sum, labels(histogram)) == (4, 104.5, {"route": "/x"})
    assert labels(found["build_info"].gauge.data_points[0]) == {"version": "1"}


@pytest.mark.anyio
async def test_a_service_pushes_what_metrics_shows(settings: Callable[..., Settings], collector: Pushes) -> None:
    app = create_app(settings(otlp_metrics=True))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://it") as client:
        while (await client.get("/readyz")).status_code != 200:
            pass
        images = [encoded(picture) for picture in pictures(3)]
        assert (await client.post("/embed", files=as_files(images))).status_code == 200
        text = (await client.get("/metrics")).text
    push = collector.get(timeout=60)  # the one at the end: the interval is an hour
    shown = {it.name: it for it in text_string_to_metric_families(text)}
    shown = {name: it for name, it in shown.items() if not name.endswith("_created") and it.samples}
    found = metrics_of(push)
    assert set(found) == {f"{name}_info" if it.type == "info" else name for name, it in shown.items()}
    assert [it.as_double for it in found["fullrank_images"].sum.data_points] == [3]
    [answered] = [
        it.as_double
        for it in found["fullrank_requests"].sum.data_points
        if labels(it) == {"route": "/embed", "code": "200"}
    ]
    assert answered == 1
    states = {labels(it)["state"]: it.as_double for it in found["fullrank_verdict"].gauge.data_points}
    assert {name for name, value in states.items() if value} == {"insufficient_data"}
    for name, it in shown.items():
        kind = found[f"{name}_info" if it.type == "info" else name]
        points = getattr(kind, kind.WhichOneof("data")).data_points
        series = {tuple(sorted((k, v) for k, v in s.labels.items() if k != "le")) for s in it.samples}
        assert {tuple(sorted(labels(point).items())) for point in points} == series, name
    named = {it.key: it.value.string_value for it in push.resource_metrics[0].resource.attributes}
    assert named["service.name"] == "fullrank"


def test_a_collector_that_is_away_delays_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away:
        def export(self, data: Any, timeout_millis: float) -> None:
            raise ConnectionError("nobody listens")

        def shutdown(self) -> None:
            pass

    caplog.set_level(logging.WARNING, "fullrank.service")
    pushing = Pushing(CollectorRegistry(), Away())  # type: ignore[arg-type]
    pushing.start()
    pushing.close()
    assert "nobody listens" in caplog.text


def test_what_is_missing_or_no_number_is_said(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "often")
    with pytest.raises(RuntimeError, match=r"OTEL_METRIC_EXPORT_INTERVAL: 'often' is no number"):
        create_app(settings(otlp_metrics=True))
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"pip install 'fullrank-server\[tracing\]'"):
        create_app(settings(otlp_metrics=True))
