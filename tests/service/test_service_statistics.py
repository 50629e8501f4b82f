"""POST /observe, GET /moments: rows from elsewhere, exact state to elsewhere, and who may."""

import asyncio
import io
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load

from fullrank import Moments
from models.embedder import normalize
from service.core import Service
from tests.service.conftest import DIMENSION, Start, as_files, encoded, error_of, pictures

pytestmark = pytest.mark.anyio
NPY = {"content-type": "application/x-npy"}


def npy(rows: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


async def test_rows_from_elsewhere_get_statistics_of_their_own(start: Start) -> None:
    rows = np.random.default_rng(0).normal(size=(512, 16))
    async with start() as (client, service):
        sent = await client.post("/observe?model=theirs", content=npy(rows[:256]), headers=NPY)
        assert (sent.status_code, sent.json()) == (202, {"model": "theirs", "rows": 256, "dimension": 16})
        body = {"model": "theirs", "rows": rows[256:].tolist()}
        assert (await client.post("/observe", json=body)).status_code == 202
        monitor = service.sidecar.get("theirs")
        assert await asyncio.to_thread(monitor.flush, 10)
        spectrum = (await client.get("/spectrum?model=theirs")).json()
        assert spectrum["windows"]["300"]["rows"] == 512
        assert spectrum["windows"]["300"]["effective_rank"] == pytest.approx(16, rel=0.05)
        assert (await client.get("/spectrum")).json()["windows"]["300"]["rows"] == 0
        metrics = (await client.get("/metrics")).text
        assert 'fullrank_rows_total{fate="sampled",model="theirs",revision="observed"} 512.0' in metrics
        assert 'fullrank_rows_total{fate="sampled",model="alpha"' in metrics


async def test_moments_are_exact_and_add_up(start: Start) -> None:
    async with start() as (client, service):
        images = [encoded(picture) for picture in pictures(96, 40)]
        answer = (await client.post("/embed", files=as_files(images), params={"normalize": "false"})).json()
        await service.engine.call(int)
        await asyncio.to_thread(service.observer.join)
        assert service.current.monitor is not None
        assert await asyncio.to_thread(service.current.monitor.flush, 10)
        for query in ("", "?window=300"):
            state = Moments.from_tensors(load((await client.get(f"/moments{query}")).content))
            rows = normalize(torch.tensor(answer["embeddings"], dtype=torch.float64))
            assert state.count == 96
            torch.testing.assert_close(state.mean(), rows.mean(0), atol=1e-6, rtol=0)
            torch.testing.assert_close(state.covariance(), torch.cov(rows.T), atol=1e-6, rtol=1e-4)
        error = error_of(await client.get("/moments?window=7"), 422, "invalid_field")
        assert "300, 3600" in error["message"]
        error_of(await client.get("/moments?window=x"), 422, "invalid_field")
        error_of(await client.get("/moments?model=nobody"), 404, "no_such_model")


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no model": ({"content": npy(np.ones((2, 4))), "headers": NPY}, 422, "model"),
    "bad model": ({"json": {"model": "../x", "rows": [[1.0, 2.0]]}}, 422, "model"),
    "ragged rows": ({"json": {"model": "m", "rows": [[1.0, 2.0], [1.0]]}}, 422, "rows"),
    "rows of text": ({"json": {"model": "m", "rows": [["a", "b"]]}}, 422, "rows"),
    "one row, flat": ({"json": {"model": "m", "rows": [1.0, 2.0]}}, 422, "rows"),
    "no rows": ({"json": {"model": "m", "rows": []}}, 422, "rows"),
    "missing rows": ({"json": {"model": "m"}}, 422, "body"),
    "not JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "body"),
    "other type": ({"content": b"x", "headers": {"content-type": "text/csv"}}, 415, "Content-Type"),
    "not npy": ({"content": b"hello", "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "pickled": ({"content": npy(np.array([{}, {}])), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "integers": ({"content": npy(np.ones((2, 4), int)), "headers": NPY, "params": {"model": "m"}}, 422, "body"),
    "cut short": ({"content": npy(np.ones((9, 4)))[:-1], "headers": NPY, "params": {"model": "m"}}, 422, "body"),
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


async def test_models_and_widths_are_bounded(start: Start) -> None:
    async with start(max_observed_models=1) as (client, _):
        assert (await client.post("/observe", json={"model": "m", "rows": [[1, 2]]})).status_code == 202
        error_of(await client.post("/observe", json={"model": "m", "rows": [[1, 2, 3]]}), 422, "invalid_field")
        error_of(await client.post("/observe", json={"model": "n", "rows": [[1, 2]]}), 422, "too_many_models")


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
