"""POST /observe, GET /moments: rows from elsewhere, exact state to elsewhere, and who may."""

import asyncio
import io
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from fullrank import Moments, Reference, SpectrumMonitor
from fullrank.calibration.resample import calibrated
from fullrank.descriptors import describe
from models import artifact
from models.embedder import Embedder, normalize
from service.encoders.registry import Service
from service.watching.sidecar import memory_of
from tests.support.app import Start, error_of, handed_to_the_next
from tests.support.images import DIMENSION, SIZE, as_files, encoded, pictures

pytestmark = pytest.mark.anyio
NPY = {"content-type": "application/x-npy"}


def npy(rows: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def npy_saying(shape: bytes) -> bytes:
    """A .npy file of 16 bytes whose header claims `shape`."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}" % shape
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)


async def test_rows_from_elsewhere_get_statistics_of_their_own(start: Start) -> None:
    rows = np.random.default_rng(0).normal(size=(512, 16))
    async with start() as (client, service):
        sent = await client.post("/observe?model=theirs", content=npy(rows[:256]), headers=NPY)
        assert (sent.status_code, sent.json()) == (
            202,
            {"model": "theirs", "rows": 256, "watched": 256, "dimension": 16},
        )
        body = {"model": "theirs", "rows": rows[256:].tolist()}
        assert (await client.post("/observe", json=body)).status_code == 202
        monitor = service.sidecar.get("theirs")
        assert await asyncio.to_thread(monitor.flush, 120)
        spectrum = (await client.get("/spectrum?model=theirs")).json()
        assert spectrum["windows"]["300"]["rows"] == 512
        assert spectrum["windows"]["300"]["effective_rank"] == pytest.approx(16, rel=0.05)
        assert (await client.get("/spectrum")).json()["windows"]["300"]["rows"] == 0
        metrics = (await client.get("/metrics")).text
        assert 'fullrank_rows_total{fate="sampled",model="theirs",revision="observed"} 512.0' in metrics
        assert 'fullrank_rows_total{fate="sampled",model="alpha"' in metrics


async def test_rows_from_elsewhere_are_compared_with_the_reference_that_is_there(start: Start, tmp_path: Path) -> None:
    healthy = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    save_file(Reference.build(healthy[::2], healthy[1::2], calibrate=False).tensors(), tmp_path / "theirs.safetensors")
    save_file({"mean": torch.zeros(3)}, tmp_path / "damaged.safetensors")
    async with start(references_dir=tmp_path) as (client, service):
        for model in ("theirs", "others"):
            body = {"model": model, "rows": healthy[:900].tolist()}
            assert (await client.post("/observe", json=body)).status_code == 202
            assert await asyncio.to_thread(service.sidecar.get(model).flush, 120)
        theirs = (await client.get("/spectrum?model=theirs")).json()
        assert theirs["verdict"]["state"] == "healthy", theirs["verdict"]
        others = (await client.get("/spectrum?model=others")).json()
        assert others["verdict"]["state"] == "insufficient_data"
        assert "FULLRANK_REFERENCES_DIR as others.safetensors" in others["verdict"]["reason"]
        bad = await client.post("/observe", json={"model": "damaged", "rows": [[1.0, 2.0]]})
        assert "tensor 'band_energy' is missing" in error_of(bad, 422, "bad_reference")["message"]
    async with start(references_dir=tmp_path) as (client, _):
        bad = await client.post("/observe", json={"model": "theirs", "rows": [[1.0, 2.0]]})
        error = error_of(bad, 422, "bad_reference")
        assert error["message"] == "theirs.safetensors describes 16 dimensions, the rows have 2"
        assert error["field"] == "rows"


async def test_a_new_monitor_is_made_once_while_other_requests_are_answered(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked, go = [], asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(*arguments: Any, **options: Any) -> SpectrumMonitor:
        loop.call_soon_threadsafe(asked.set)
        assert go.wait(120)
        made.append(SpectrumMonitor(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("service.watching.sidecar.SpectrumMonitor", slow)
    async with start() as (client, _):
        body = {"model": "theirs", "rows": [[1.0, 2.0], [3.0, 5.0]]}
        first, second = (asyncio.create_task(client.post("/observe", json=body)) for _ in range(2))
        await asyncio.wait_for(asked.wait(), 120)
        assert (await client.get("/healthz")).status_code == 200
        error_of(await client.get("/spectrum?model=theirs"), 404, "no_such_model")
        assert not first.done()
        go.set()
        assert [answer.status_code for answer in await asyncio.gather(first, second)] == [202, 202]
        (monitor,) = made
        assert await asyncio.to_thread(monitor.flush, 120)
        assert monitor.counters.rows["sampled"] == 4


async def seen(client: httpx.AsyncClient, service: Service, images: np.ndarray) -> dict[str, Any]:
    """The spectrum once these images (n, s, s) are in it."""
    files = [encoded(image) for image in images]
    for i in range(0, len(files), 100):
        assert (await client.post("/embed", files=as_files(files[i : i + 100]))).status_code == 200
    await service.engine.call(int)
    assert await asyncio.to_thread(service.engine.settle, 120)
    assert service.current.monitor is not None
    assert await asyncio.to_thread(service.current.monitor.flush, 120)
    spectrum: dict[str, Any] = (await client.get("/spectrum")).json()
    return spectrum


@pytest.fixture(scope="module")
def calibrated_alpha(encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpha with a reference that knows its inputs."""
    folder = tmp_path_factory.mktemp("calibrated") / "alpha"
    alpha = artifact.load(encoders / "alpha")
    embedder, images = Embedder(alpha), [pictures(1024, seed)[:, None] for seed in (11, 12)]
    first, second = (normalize(embedder.embed(it)) for it in images)
    assert alpha.canary is not None
    reference = Reference.build(first, second, canary=alpha.canary.embeddings, calibrate=False)
    known = calibrated(reference, second, None, describe(images[1]), windows=4, blocks=20)
    artifact.save(replace(alpha, reference=known), folder)
    return folder


async def test_the_spectrum_says_how_sure_it_is_and_why(start: Start, calibrated_alpha: Path) -> None:
    async with start(encoder=calibrated_alpha, block_rows=64) as (client, service):
        empty = (await client.get("/spectrum")).json()
        assert empty["verdict"]["state"] == "insufficient_data"
        assert "256" in empty["verdict"]["reason"]  # how many rows it waits for
        spectrum = await seen(client, service, pictures(600, 21))
        assert spectrum["verdict"]["state"] == "healthy", spectrum["verdict"]
        assert "600 rows" in spectrum["verdict"]["reason"]
        window = spectrum["windows"]["300"]
        assert window["rows"] == 600
        for interval in (window["participation_ratio"], window["head"], *(band["ratio"] for band in window["bands"])):
            assert interval["lower"] < interval["estimate"] < interval["upper"]
        assert spectrum["input_participation_ratio"] > 1
        shift, limit = spectrum["inputs"]["texture_shift"], spectrum["thresholds"]["texture_shift"]
        assert 0 <= shift < limit
        metrics = (await client.get("/metrics")).text
        assert f'fullrank_texture_shift{{model="alpha",revision="{service.current.revision}"}} {shift}' in metrics
        assert spectrum["reference"]["rows"] == 1024


async def test_answers_handed_to_the_next_request_are_found_without_a_canary(
    start: Start, calibrated_alpha: Path, tmp_path: Path
) -> None:
    """The rows are the usual rows and the images the usual images; they are not each other's."""
    alpha = artifact.load(calibrated_alpha)
    assert alpha.reference is not None
    blind = replace(alpha, canary=None, reference=replace(alpha.reference, canary=None))
    artifact.save(blind, tmp_path / "alpha")
    async with start(encoder=tmp_path / "alpha", block_rows=64) as (client, service):
        well = await seen(client, service, pictures(600, 21))
        assert well["verdict"]["state"] == "healthy", well["verdict"]
        assert well["measures"]["input_correlation"]["lower"] > well["thresholds"]["input_correlation"]
    async with start(encoder=tmp_path / "alpha", block_rows=64) as (client, service):
        served = service.current
        served.embed = handed_to_the_next(served, served.embed)  # type: ignore[method-assign]
        found = await seen(client, service, pictures(600, 21))
        assert found["canary"] is None
        assert found["verdict"]["state"] == "model_fault", found["verdict"]
        assert "do not follow their inputs" in found["verdict"]["reason"]
        assert found["windows"]["300"]["effective_rank"] == pytest.approx(
            well["windows"]["300"]["effective_rank"], rel=0.01
        )
        metrics = (await client.get("/metrics")).text
        upper = found["measures"]["input_correlation"]["upper"]
        assert (
            f'fullrank_input_correlation{{bound="upper",model="alpha",revision="{served.revision}"}} {upper}' in metrics
        )


async def test_one_image_again_and_again_counts_once(start: Start, calibrated_alpha: Path) -> None:
    async with start(encoder=calibrated_alpha, block_rows=64) as (client, service):
        spectrum = await seen(client, service, np.repeat(pictures(1, 5), 300, axis=0))
        assert spectrum["counters"]["rows"] == {"sampled": 1, "duplicate": 299, "dropped": 0, "nonfinite": 0, "zero": 0}
        assert spectrum["verdict"]["state"] == "insufficient_data"
        metrics = (await client.get("/metrics")).text
        assert 'fullrank_rows_total{fate="duplicate",model="alpha",' in metrics
        assert 'fullrank_input_participation_ratio{model="alpha",' in metrics


async def test_nearly_one_image_is_blamed_on_the_traffic(start: Start, calibrated_alpha: Path) -> None:
    """Every image another by a grey level here and there: the embeddings fall together, and the model is well."""
    rng = np.random.default_rng(0)
    nearly = (pictures(1, 5).astype(int) + rng.integers(0, 2, (400, SIZE, SIZE))).clip(0, 255).astype(np.uint8)
    async with start(encoder=calibrated_alpha, block_rows=64) as (client, service):
        spectrum = await seen(client, service, nearly)
        assert spectrum["counters"]["rows"]["sampled"] == 400
        window = spectrum["windows"]["300"]
        assert window["total_variance"] < 0.1 * spectrum["reference"]["total_variance"]
        assert spectrum["canary"]["cosine_min"] > 0.99
        assert spectrum["verdict"]["state"] == "traffic_narrowed", spectrum["verdict"]
        assert "input" in spectrum["verdict"]["reason"]


async def test_without_a_reference_the_command_that_builds_one_is_named(
    start: Start, encoders: Path, tmp_path: Path
) -> None:
    bare = replace(artifact.load(encoders / "alpha"), reference=None, canary=None)
    artifact.save(bare, tmp_path / "bare")
    async with start(encoder=tmp_path / "bare", block_rows=64) as (client, service):
        assert (await client.get("/readyz")).status_code == 200
        spectrum = await seen(client, service, pictures(400, 22))
        assert spectrum["verdict"]["state"] == "insufficient_data"
        assert "`fullrank reference ENCODER --data DIR`" in spectrum["verdict"]["reason"]
        assert spectrum["windows"]["300"]["participation_ratio"]["estimate"] > 1
        assert spectrum["reference"] is None


async def test_moments_are_exact_and_add_up(start: Start) -> None:
    async with start() as (client, service):
        images = [encoded(picture) for picture in pictures(96, 40)]
        answer = (await client.post("/embed", files=as_files(images), params={"normalize": "false"})).json()
        assert await asyncio.to_thread(service.engine.settle, 120)
        assert service.current.monitor is not None
        assert await asyncio.to_thread(service.current.monitor.flush, 120)
        for query in ("", "?window=300"):
            state = Moments.from_tensors(load((await client.get(f"/moments{query}")).content))
            rows = normalize(torch.tensor(answer["embeddings"], dtype=torch.float64))
            assert state.count == 96
            torch.testing.assert_close(state.mean(), rows.mean(0), atol=1e-6, rtol=0)
            torch.testing.assert_close(state.covariance(), torch.cov(rows.T), atol=1e-6, rtol=1e-4)
        error = error_of(await client.get("/moments?window=7"), 422, "invalid_field")
        assert "300, 3600" in error["message"]
        error = error_of(await client.get("/moments?window=x"), 422, "invalid_field")
        assert error["field"] == "window"
        error_of(await client.get("/moments?model=nobody"), 404, "no_such_model")


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no model": ({"content": npy(np.ones((2, 4))), "headers": NPY}, 422, "model"),
    "bad model": ({"json": {"model": "../x", "rows": [[1.0, 2.0]]}}, 422, "model"),
    "ragged rows": ({"json": {"model": "m", "rows": [[1.0, 2.0], [1.0]]}}, 422, "rows"),
    "rows of text": ({"json": {"model": "m", "rows": [["a", "b"]]}}, 422, "rows[0]"),
    "one row, flat": ({"json": {"model": "m", "rows": [1.0, 2.0]}}, 422, "rows"),
    "no rows": ({"json": {"model": "m", "rows": []}}, 422, "rows"),
    "missing rows": ({"json": {"model": "m"}}, 422, "body"),
    "not JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "body"),
    "other type": ({"content": b"x", "headers": {"content-type": "text/csv"}}, 415, "Content-Type"),
    "not npy": ({"content": b"hello", "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "pickled": ({"content": npy(np.array([{}, {}])), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "integers": ({"content": npy(np.ones((2, 4), int)), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "cut short": ({"content": npy(np.ones((9, 4)))[:-1], "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "sides below 0": ({"content": npy_saying(b"(-1, -4)"), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "sides that are no numbers": (
        {"content": npy_saying(b"(True, 4)"), "headers": NPY, "params": {"model": "m"}},
        422,
        "body",
    ),
    "nested": ({"content": npy_saying(b"(" * 5000), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "too many values": (
        {"content": b"[" + b"0," * 1_000_001 + b"0]", "headers": {"content-type": "application/json"}},
        413,
        "body",
    ),
    "too wide": ({"content": npy(np.ones((1, 4096))), "headers": NPY, "params": {"model": "m"}}, 422, "rows"),
    "the served encoder": ({"json": {"model": "alpha", "rows": [[1.0, 2.0]]}}, 409, "model"),
}


@pytest.mark.parametrize("case", BAD)
async def test_rows_that_cannot_be_observed_are_refused(shared: tuple[httpx.AsyncClient, Service], case: str) -> None:
    request, status, field = BAD[case]
    client, service = shared
    response = await client.post("/observe", **request)
    assert response.status_code == status, response.text
    assert response.json()["error"]["field"] == field
    assert list(service.sidecar) == []


@pytest.mark.filterwarnings("error::RuntimeWarning")
async def test_rows_beyond_float32_count_as_not_finite_without_a_warning(start: Start) -> None:
    rows = [[1.0, 2.0], [1e300, 1.0]]
    async with start() as (client, service):
        assert (await client.post("/observe", json={"model": "m", "rows": rows})).status_code == 202
        assert (await client.post("/observe?model=m", content=npy(np.array(rows)), headers=NPY)).status_code == 202
        monitor = service.sidecar.get("m")
        assert await asyncio.to_thread(monitor.flush, 120)
        assert (monitor.counters.rows["sampled"], monitor.counters.rows["nonfinite"]) == (2, 2)


async def test_models_and_widths_are_bounded(start: Start) -> None:
    async with start(max_observed_models=1) as (client, _):
        assert (await client.post("/observe", json={"model": "m", "rows": [[1, 2]]})).status_code == 202
        error_of(await client.post("/observe", json={"model": "m", "rows": [[1, 2, 3]]}), 422, "invalid_field")
        error_of(await client.post("/observe", json={"model": "n", "rows": [[1, 2]]}), 422, "too_many_models")


async def test_the_memory_of_observed_models_is_bounded_and_comes_back_from_idle_ones(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = memory_of(64) + memory_of(32)
    async with start(max_observed_bytes=room, windows=(1.0, 2.0)) as (client, service):

        async def observe(model: str, width: int) -> httpx.Response:
            return await client.post("/observe", json={"model": model, "rows": [list(range(1, width + 1))]})

        assert [(await observe(*it)).status_code for it in (("a", 64), ("b", 32))] == [202, 202]
        error = error_of(await observe("c", 64), 422, "too_many_models")
        assert "max_observed_bytes" in error["message"]
        now = time.monotonic()
        monkeypatch.setattr("service.watching.sidecar.time.monotonic", lambda: now + 2.5)
        assert (await observe("b", 32)).status_code == 202  # a is idle for longer than the longest window, b is not
        assert (await observe("c", 64)).status_code == 202
        assert {model for model, _, _ in service.sidecar} == {"b", "c"}


async def test_inputs_count_in_the_memory_of_observed_models(start: Start) -> None:
    """Their statistics take as many matrices of their width as those of rows take of the dimension."""
    async with start(max_observed_bytes=memory_of(2, inputs=100)) as (client, service):

        async def observe(model: str, width: int) -> httpx.Response:
            return await client.post("/observe", json={"model": model, "rows": [[1, 2]], "inputs": [[0.5] * width]})

        error = error_of(await observe("a", 101), 422, "too_many_models")
        assert (error["field"], "max_observed_bytes" in error["message"]) == ("inputs", True)
        assert (await observe("a", 100)).status_code == 202
        assert (await observe("a", 100)).status_code == 202
        error_of(await observe("b", 1), 422, "too_many_models")
        assert await asyncio.to_thread(service.sidecar.get("a").flush, 120)
        assert service.sidecar.get("a").counters.rows["sampled"] == 2


async def test_only_the_trusted_may_read_or_write_state(start: Start) -> None:
    async with start(address="10.0.0.9") as (client, _):
        error_of(await client.get("/moments"), 403, "forbidden")
        error_of(await client.post("/observe", json={"model": "m", "rows": [[1, 2]]}), 403, "forbidden")
        assert (await client.get("/spectrum")).status_code == 200
    async with start(address="10.0.0.9", api_key="correct horse") as (client, _):
        error_of(await client.get("/moments"), 401, "unauthorized")
        headers = {"authorization": "bearer correct horse"}
        moments = await client.get("/moments", headers=headers)
        assert Moments.from_tensors(load(moments.content)).dimension == DIMENSION
