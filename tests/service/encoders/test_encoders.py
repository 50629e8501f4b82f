"""Several encoders side by side: chosen by name, watched apart, swapped one by one."""

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest

from models import artifact
from models.embedder import Embedder, normalize
from service.encoders.registry import Service
from tests.support.app import Start, error_of
from tests.support.images import as_files, as_json, encoded, pictures

pytestmark = pytest.mark.anyio
IMAGES = [encoded(picture) for picture in pictures(3)]


def wanted(folder: Path) -> np.ndarray:
    return normalize(Embedder(artifact.load(folder)).embed(pictures(3)[:, None])).numpy()


async def test_the_model_chooses_the_encoder_in_every_form(start: Start, encoders: Path) -> None:
    async with start(encoders=("beta",)) as (client, service):
        beta = wanted(encoders / "beta")
        pinned = str(service.served("beta"))
        answers = [
            await client.post("/embed", files=as_files(IMAGES), params={"model": "beta"}),
            await client.post("/embed", files=as_files(IMAGES), data={"model": "beta"}),
            await client.post("/embed", json=as_json(IMAGES, model=pinned)),
        ]
        for answer in answers:
            assert answer.json()["model"] == "beta"
            np.testing.assert_allclose(answer.json()["embeddings"], beta, atol=1e-5)
        texts = as_json(IMAGES)["images"]
        openai = await client.post("/v1/embeddings", json={"model": "beta", "input": texts})
        np.testing.assert_allclose([it["embedding"] for it in openai.json()["data"]], beta, atol=1e-5)
        tensor = {"name": "images", "datatype": "BYTES", "shape": [3], "data": texts}
        v2 = (await client.post("/v2/models/beta/infer", json={"inputs": [tensor]})).json()
        assert v2["model_name"] == "beta"
        np.testing.assert_allclose(np.reshape(v2["outputs"][0]["data"], beta.shape), beta, atol=1e-5)
        default = await client.post("/embed", files=as_files(IMAGES))
        np.testing.assert_allclose(default.json()["embeddings"], wanted(encoders / "alpha"), atol=1e-5)


async def test_an_unknown_model_is_404_and_named_with_what_there_is(start: Start) -> None:
    async with start(encoders=("beta",)) as (client, service):
        for model in ("gamma", "beta@000000000000"):
            error = error_of(await client.post(f"/embed?model={model}", files=as_files(IMAGES)), 404, "model_not_found")
            assert str(service.served("alpha")) in error["message"]
            assert str(service.served("beta")) in error["message"]
        assert service.admission.pending == 0


async def count(client: httpx.AsyncClient, model: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("fullrank_encoder_images_total{") and f'model="{model}"' in line
    )


async def test_each_has_its_own_monitor_and_metrics(start: Start) -> None:
    async with start(encoders=("beta",)) as (client, service):
        assert (await client.post("/embed?model=beta", files=as_files(IMAGES))).status_code == 200
        assert await asyncio.to_thread(service.engine.settle, 120)
        seen = {}
        for name in ("alpha", "beta"):
            monitor = service.served(name).monitor
            assert monitor is not None
            assert await asyncio.to_thread(monitor.flush, 120)
            seen[name] = monitor.counters.rows["sampled"]
            assert (await client.get("/spectrum", params={"model": name})).json()["model"] == name
        assert seen == {"alpha": 0, "beta": 3}
        assert [await count(client, name) for name in ("alpha", "beta")] == [0, 3]


def named(service: Service) -> list[str]:
    return [served.name for served in service.in_service()]


async def test_a_swap_replaces_one_and_leaves_the_others(start: Start) -> None:
    async with start(encoders=("beta",)) as (client, service):
        alpha, beta = service.in_service()
        again = await client.post("/admin/encoders", json={"name": "beta"})
        assert again.json()["previous"]["model"] == "beta"
        assert named(service) == ["alpha", "beta"]
        assert service.served("alpha") is alpha
        assert service.served("beta") is not beta
        swap = {"name": "collapsed", "gate": "off", "replaces": "beta"}
        assert (await client.post("/admin/encoders", json=swap)).status_code == 200
        assert named(service) == ["alpha", "collapsed"]
        twice = {"name": "alpha", "gate": "off", "replaces": "collapsed"}
        error_of(await client.post("/admin/encoders", json=twice), 409, "name_in_service")
        nobody = await client.post("/admin/encoders", json={"name": "beta", "replaces": "nobody"})
        assert error_of(nobody, 404, "model_not_found")["field"] == "replaces"
        assert named(service) == ["alpha", "collapsed"]
        assert 'model="beta"' not in "".join(
            line for line in (await client.get("/metrics")).text.splitlines() if "encoder_images" in line
        )


async def test_one_that_cannot_be_loaded_or_is_there_twice_keeps_all_unready(start: Start) -> None:
    for bad, words in (("nowhere", "not a folder"), ("alpha", "another encoder in service")):
        async with start(encoders=(bad,)) as (client, _):
            assert words in error_of(await client.get("/readyz"), 503, "failed")["message"]
