"""Health, metrics, limits, the spectrum and the page."""

import asyncio
import re

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from service.encoders.registry import Service
from service.http.app import create_app
from service.settings import Settings
from service.watching.observer import BURST
from tests.support.app import Start, error_of
from tests.support.images import DIMENSION, as_files, encoded, pictures

pytestmark = pytest.mark.anyio

SERVING = {
    "fullrank_requests": "counter",
    "fullrank_request_seconds": "histogram",
    "fullrank_phase_seconds": "histogram",
    "fullrank_batch_size": "histogram",
    "fullrank_images": "counter",
    "fullrank_batches": "counter",
    "fullrank_pending_images": "gauge",
    "fullrank_rejected_images": "counter",
    "fullrank_build_info": "gauge",
}
SPECTRUM = (
    "effective_rank",
    "rankme",
    "participation_ratio",
    "eigenvalue",
    "total_variance",
    "mean_cosine",
    "canary_cosine_min",
    "canary_participation_ratio",
    "input_participation_ratio",
    "mean_shift_ratio",
    "embedding_norm",
    "threshold",
    "verdict",
    "reference_participation_ratio",
    "reference_effective_rank",
    "reference_band_energy",
    "snapshot_timestamp_seconds",
)
COUNTERS = ("trace_product", "frobenius_product", "band_energy", "rows", "monitor_seconds")


async def send(client: httpx.AsyncClient, service: Service, count: int, seed: int = 20) -> None:
    """So many distinct images, and wait until the monitor has them in its snapshot."""
    images = [encoded(picture) for picture in pictures(count, seed)]
    for i in range(0, count, 64):
        response = await client.post("/embed", files=as_files(images[i : i + 64]))
        assert response.status_code == 200, response.text
    await service.engine.call(int)  # the batch is handed over once its answers are on their way
    assert await asyncio.to_thread(service.engine.settle, 120)
    assert service.current.monitor is not None
    assert await asyncio.to_thread(service.current.monitor.flush, 120)


async def test_metrics_parse_and_hold_the_names_of_the_design(start: Start) -> None:
    async with start() as (client, service):
        await send(client, service, 8)
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(response.text)}
        for name, kind in SERVING.items():
            assert families[name].type == kind
        assert {f"fullrank_{name}" for name in SPECTRUM} <= families.keys()
        assert {f"fullrank_{name}" for name in COUNTERS} <= families.keys()
        states = [sample.value for sample in families["fullrank_verdict"].samples]
        assert sorted(states) == [0] * (len(states) - 1) + [1]
        phases = {sample.labels["phase"] for sample in families["fullrank_phase_seconds"].samples}
        assert phases == {"decode", "queue", "forward", "encode"}
        reasons = {sample.labels["reason"]: sample.value for sample in families["fullrank_rejected_images"].samples}
        assert set(reasons.values()) == {0.0}  # initialised, and nothing refused

        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        response = await client.get("/metrics", headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert "fullrank_effective_rank" in {family.name for family in openmetrics(response.text)}


async def test_traffic_shows_on_metrics_and_in_the_spectrum(start: Start) -> None:
    async with start(block_rows=64) as (client, service):
        assert await asyncio.to_thread(service.current.monitor.flush, 120)  # type: ignore[union-attr]
        before = (await client.get("/spectrum")).json()
        assert before["verdict"]["state"] == "insufficient_data"
        assert before["canary"]["cosine_min"] == pytest.approx(1.0, abs=1e-5)
        await send(client, service, 640)
        after = (await client.get("/spectrum")).json()
        assert (after["model"], after["revision"]) == ("alpha", service.current.revision)
        assert after["verdict"]["state"] == "healthy", after["verdict"]
        window = after["windows"]["300"]
        assert window["rows"] == 640
        assert len(window["eigenvalues"]) == DIMENSION
        reference = service.current.artifact.reference
        assert reference is not None
        assert window["effective_rank"] == pytest.approx(reference.effective_rank, rel=0.25)

        families = {f.name: f for f in text_string_to_metric_families((await client.get("/metrics")).text)}
        ranks = {s.labels["window"]: s.value for s in families["fullrank_effective_rank"].samples}
        assert ranks == {"5m": window["effective_rank"], "1h": window["effective_rank"]}
        rows = {s.labels["fate"]: s.value for s in families["fullrank_rows"].samples}
        assert rows == {"sampled": 640, "duplicate": 0, "dropped": 0, "nonfinite": 0, "zero": 0}

        for seed in (21, 21):
            await send(client, service, 64, seed)
        rows = service.current.monitor.counters.rows  # type: ignore[union-attr]
        assert (rows["sampled"], rows["duplicate"]) == (704, 64)


async def test_beyond_its_rate_the_monitor_sees_a_sample(start: Start) -> None:
    async with start(monitor_rate=1e-6) as (client, service):  # what may come at once, and no more
        for seed in range(3):
            await send(client, service, 128, seed)
        counters = service.current.monitor.counters  # type: ignore[union-attr]
        assert counters.rows == {"sampled": BURST, "duplicate": 0, "dropped": 0, "nonfinite": 0, "zero": 0}
        assert counters.unsampled == 3 * 128 - BURST
        assert f"fullrank_unsampled_images_total {3 * 128 - BURST}.0" in (await client.get("/metrics")).text


async def test_the_canary_is_embedded_again_and_again(start: Start) -> None:
    async with start(canary_period=0.02) as (client, service):
        assert (await client.get("/spectrum")).json()["verdict"]["state"] == "insufficient_data"
        honest = service.current.embed
        service.current.embed = lambda pixels: honest(255 - pixels)  # type: ignore[method-assign]
        async with asyncio.timeout(120):
            while (await client.get("/spectrum")).json()["verdict"]["state"] != "model_fault":
                await asyncio.sleep(0.02)
        assert service.metrics.registry.get_sample_value("fullrank_images_total") == 0


async def test_info_gives_limits_and_versions(start: Start) -> None:
    async with start(max_images_per_request=7) as (client, service):
        info = (await client.get("/info")).json()
        assert info["limits"]["max_images_per_request"] == 7
        assert info["encoder"]["revision"] == service.current.revision
        assert info["encoder"]["preprocessing"]["size"] == 28
        assert info["engine"] == {"name": "onnx", "device": "cpu", "dtype": "float32", "threads": 1}


async def test_health_and_drain(start: Start) -> None:
    async with start() as (client, service):
        assert (await client.get("/healthz")).json() == {"status": "alive"}
        assert (await client.get("/readyz")).json()["model"] == "alpha"
        service.drain()
        error_of(await client.get("/readyz"), 503, "draining")
        answer = await client.post("/embed", files=as_files([encoded(pictures(1)[0])]))
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
    assert service.phase == "stopped"


async def test_without_a_monitor_it_serves_and_says_so(start: Start) -> None:
    async with start(monitor=False) as (client, _):
        assert (await client.post("/embed", files=as_files([encoded(pictures(1)[0])]))).status_code == 200
        error_of(await client.get("/spectrum"), 404, "not_monitored")
        assert (await client.get("/metrics")).status_code == 200


async def test_openapi_describes_every_form(start: Start) -> None:
    async with start() as (client, _):
        schema = (await client.get("/openapi.json")).json()
        embed = schema["paths"]["/embed"]["post"]
        assert {"image/*", "multipart/form-data", "application/json"} <= embed["requestBody"]["content"].keys()
        assert {"200", "413", "422", "429", "503"} <= embed["responses"].keys()


async def test_the_api_is_shown_without_another_server() -> None:
    transport = httpx.ASGITransport(create_app(Settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        page = await client.get("/docs")
        assert "connect-src 'self'" in page.headers["content-security-policy"]
        loaded = re.findall(r"""(?:href|src|url)(?:=|: )["']([^"']*)["']""", page.text)
        assert loaded == ["docs/swagger-ui.css", "data:,", "docs/swagger-ui-bundle.js", "openapi.json"]
        for name, kind in ((loaded[0], "text/css"), (loaded[2], "text/javascript"), (loaded[3], "application/json")):
            response = await client.get(f"/{name}")
            assert response.status_code == 200
            assert response.headers["content-type"].startswith(kind)
        assert (await client.get("/docs/core.py")).status_code == 422


def test_settings_come_from_the_environment_and_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLRANK_WINDOWS", "20, 300")
    monkeypatch.setenv("FULLRANK_MAX_BATCH", "8")
    monkeypatch.setenv("FULLRANK_API_KEY", "long enough")
    settings = Settings()
    assert settings.windows == (20.0, 300.0)
    assert settings.max_batch == 8
    assert "long enough" not in repr(settings)
    monkeypatch.setenv("FULLRANK_WINDOWS", "[60]")
    assert Settings().windows == (60.0,)
    for wrong in ({"max_images_per_request": 600}, {"windows": "a"}, {"port": 70000}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            Settings(**wrong)  # type: ignore[arg-type]
    assert all(field.description for field in Settings.model_fields.values())
