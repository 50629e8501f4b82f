"""POST /observe as the library's equal, references by upload, and a sidecar that serves no encoder."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_tensors

from fullrank import Reference
from fullrank.calibration.resample import calibrated
from fullrank.client import AsyncClient, EmbeddingError
from fullrank.descriptors import describe, thumbnails
from service.encoders.registry import Service
from service.watching.sidecar import MAX_DIMENSION
from tests.support.app import Start, error_of

pytestmark = pytest.mark.anyio
D = 16
TENSORS = {"content-type": "application/x-safetensors"}
SIDECAR = {"encoder": Path("none")}


def rows_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def a_reference(*, inputs: bool = False, textures: bool = False) -> Reference:
    built = Reference.build(rows_of(1200, 1), rows_of(1200, 2), canary=rows_of(40, 3))
    if not (inputs or textures):
        return built
    images = torch.from_numpy((describe if textures else thumbnails)(pictures_of(1200)))
    return calibrated(built, torch.from_numpy(rows_of(1200, 2)), None, images, windows=2, blocks=10)


def pictures_of(n: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (n, 1, 8, 8), np.uint8)


async def spectrum(client: httpx.AsyncClient, service: Service, model: str = "theirs") -> dict[str, Any]:
    assert await asyncio.to_thread(service.sidecar.get(model).flush, 120)
    found: dict[str, Any] = (await client.get("/spectrum", params={"model": model})).json()
    return found


async def test_json_and_safetensors_bring_all_that_the_library_takes(start: Start, tmp_path: Path) -> None:
    async with start(references_dir=tmp_path, **SIDECAR) as (client, service):
        put = await client.put("/admin/references/theirs", content=save_tensors(a_reference(inputs=True).tensors()))
        assert put.status_code == 200, put.text
        assert put.json() == {
            "model": "theirs",
            "dimension": D,
            "rows": 1200,
            "calibrated": True,
            "inputs": True,
            "canary": 40,
        }
        rows, keys = rows_of(600, 10), np.arange(600) % 500
        body = {"rows": rows, "keys": keys, "thumbnails": pictures_of(600), "canary": rows_of(40, 3)}
        sent = await client.post("/observe?model=theirs", content=save(body), headers=TENSORS)
        assert (sent.status_code, sent.json()) == (
            202,
            {"model": "theirs", "rows": 600, "watched": 600, "dimension": D},
        )
        seen = await spectrum(client, service)
        assert (seen["windows"]["300"]["rows"], seen["counters"]["rows"]["duplicate"]) == (500, 100)
        assert seen["canary"]["neighbours_overlap"] == 1
        assert seen["inputs"]["distance"] < 1
        more = {
            "model": "theirs",
            "rows": rows_of(3, 11).tolist(),
            "keys": ["a", "b", "a"],
            "inputs": thumbnails(pictures_of(3)).tolist(),
            "canary": rows_of(40, 77).tolist(),
        }
        assert (await client.post("/observe", json=more)).status_code == 202
        seen = await spectrum(client, service)
        assert seen["windows"]["300"]["rows"] == 502
        assert seen["verdict"]["state"] == "model_fault"
        only = await client.post("/observe", json={"model": "theirs", "canary": rows_of(40, 3).tolist()})
        assert only.json() == {"model": "theirs", "rows": 0, "watched": 0, "dimension": D}
        assert (await spectrum(client, service))["verdict"]["state"] != "model_fault"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"rows": [[1.0, 2.0]], "keys": ["a", "b"]}, "keys", "expected 1, one a row, got 2"),
        ({"rows": [[1.0, 2.0]], "keys": [1.5]}, "keys", "strings or integers"),
        ({"rows": [[1.0, 2.0]], "inputs": [[1.0], [2.0]]}, "inputs", "expected 1"),
        ({"rows": [[1.0, 2.0]], "inputs": [[]]}, "inputs", "1 <= d"),
        ({"rows": [[1.0, 2.0]], "inputs": []}, "inputs", "1 <= d"),
        ({"keys": ["a"]}, "body", "rows"),
        ({"rows": [[1.0, 2.0]], "labels": [1]}, "body", "keys, inputs, canary"),
        ({"rows": [[1.0, 2.0]], "canary": [[1.0, 2.0]]}, "canary", "the reference has none"),
        ({"canary": [["x"]]}, "canary[0]", "no number"),
    ],
)
async def test_bad_fields_of_json_are_named(start: Start, body: dict[str, Any], field: str, words: str) -> None:
    async with start(**SIDECAR) as (client, _):
        error = error_of(await client.post("/observe", json={"model": "theirs"} | body), 422, "invalid_field")
        assert error["field"] == field
        assert words in error["message"]


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"rows": np.ones((2, 3), np.int32)}, "rows"),
        ({"rows": np.ones((2, 3), np.float32), "keys": np.ones(2, np.float32)}, "keys"),
        ({"rows": np.ones((2, 3), np.float32), "thumbnails": np.ones((2, 1, 4, 4), np.uint8)}, "thumbnails"),
        ({"rows": np.ones((2, 3), np.float32), "thumbnails": np.ones((2, 1, 99, 99), np.uint8)}, "thumbnails"),
        ({"rows": np.ones((2, 3), np.float32), "thumbnails": np.ones((0, 1, 8, 8), np.uint8)}, "inputs"),
        ({"rows": np.ones((2, 3), np.float32), "other": np.ones(2, np.float32)}, "body"),
        ({"rows": np.ones((2, MAX_DIMENSION + 1), np.float32)}, "rows"),
        ({"rows": np.ones((2, 3, 1), np.float32)}, "rows"),
    ],
)
async def test_bad_tensors_are_named(start: Start, tensors: dict[str, np.ndarray], field: str) -> None:
    async with start(**SIDECAR) as (client, _):
        answer = await client.post("/observe?model=theirs", content=save(tensors), headers=TENSORS)
        assert error_of(answer, 422, "invalid_field")["field"] == field
        cut = await client.post("/observe?model=theirs", content=save(tensors)[:-1], headers=TENSORS)
        assert error_of(cut, 422, "invalid_field")["field"] == "body"


async def test_inputs_of_another_kind_than_the_references_are_refused(start: Start, tmp_path: Path) -> None:
    async with start(references_dir=tmp_path, **SIDECAR) as (client, _):
        await client.put("/admin/references/theirs", content=save_tensors(a_reference(inputs=True).tensors()))
        body = {"model": "theirs", "rows": rows_of(2, 1).tolist(), "inputs": [[1.0], [2.0]]}
        error = error_of(await client.post("/observe", json=body), 422, "invalid_field")
        assert error["message"] == "the inputs of theirs's reference have 64 values each, these 1"


@pytest.mark.parametrize("textures", [True, False])
async def test_descriptors_of_whole_images_and_thumbnails_are_compared_but_not_mixed(
    start: Start, tmp_path: Path, textures: bool
) -> None:
    pa = pytest.importorskip("pyarrow")
    rows, images = rows_of(300, 10), pictures_of(300)
    whole = describe(images)

    async def send(client: httpx.AsyncClient, kind: str) -> httpx.Response:
        """Whole images' descriptors in one of three formats, or thumbnails."""
        if kind == "json":
            body = {"model": "theirs", "rows": rows.tolist(), "inputs": whole.tolist()}
            return await client.post("/observe", json=body)
        if kind == "arrow":
            columns = {"rows": pa.array(rows.tolist()), "inputs": pa.array(whole.tolist())}
            table, sink = pa.table(columns), pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            headers = {"content-type": "application/vnd.apache.arrow.stream"}
            return await client.post("/observe?model=theirs", content=sink.getvalue().to_pybytes(), headers=headers)
        tensors = {"rows": rows} | ({"inputs": whole} if kind == "tensors" else {"thumbnails": images})
        return await client.post("/observe?model=theirs", content=save(tensors), headers=TENSORS)

    reference = save_tensors(a_reference(inputs=True, textures=textures).tensors())
    async with start(references_dir=tmp_path, **SIDECAR) as (client, service):
        assert (await client.put("/admin/references/theirs", content=reference)).status_code == 200
        for kind in ("json", "arrow", "tensors"):
            assert (await send(client, kind)).status_code == 202
        refused = error_of(await send(client, "thumbnails"), 422, "invalid_field")
        assert (refused["field"], refused["message"]) == ("inputs", "inputs: expected width 96, got 64")
        seen = await spectrum(client, service)
        assert (seen["windows"]["300"]["rows"], seen["counters"]["rows"]["dropped"]) == (900, 0)
        assert seen["inputs"]["distance"] < 0.5
        assert (seen["inputs"]["texture_shift"] is not None) is textures
        # A reference that is put in its place begins anew, and so does what clients may send.
        other = save_tensors(a_reference(inputs=True, textures=not textures).tensors())
        assert (await client.put("/admin/references/theirs", content=other)).status_code == 200
        assert (await send(client, "thumbnails")).status_code == 202
        for kind in ("json", "arrow", "tensors"):
            assert "expected width 64, got 96" in error_of(await send(client, kind), 422, "invalid_field")["message"]
        seen = await spectrum(client, service)
        assert seen["windows"]["300"]["rows"] == 300
        assert seen["inputs"]["distance"] < 0.5
        assert seen["inputs"]["texture_shift"] is None


async def test_a_reference_is_replaced_without_a_restart(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    async with start(references_dir=tmp_path, **SIDECAR) as (client, service):
        body = {"model": "theirs", "rows": rows_of(900, 10).tolist()}
        assert (await client.post("/observe", json=body)).status_code == 202
        assert (await spectrum(client, service))["verdict"]["state"] == "insufficient_data"
        good = save_tensors(a_reference().tensors())
        assert (await client.put("/admin/references/theirs", content=good)).status_code == 200
        assert (await client.post("/observe", json=body)).status_code == 202
        assert (await spectrum(client, service))["verdict"]["state"] == "healthy"
        bad = await client.put("/admin/references/theirs", content=good[:-8])
        assert error_of(bad, 422, "bad_reference")["field"] == "body"
        other = Reference.build(rows_of(200, 1)[:, :8], rows_of(200, 2)[:, :8]).tensors()
        refused = await client.put("/admin/references/theirs", content=save_tensors(other))
        assert "have 16 dimensions, the reference 8" in error_of(refused, 422, "bad_reference")["message"]
        assert path.read_bytes() == good
        assert (await spectrum(client, service))["windows"]["300"]["rows"] == 900
        odd = save_tensors(a_reference().tensors() | {"mean": torch.zeros(D, dtype=torch.float8_e5m2)})
        refused = await client.put("/admin/references/theirs", content=odd)
        assert "'mean' is of torch.float8_e5m2" in error_of(refused, 422, "bad_reference")["message"]
        # By hand, in the folder: damaged, it is not used; then removed.
        for damaged in (b"damaged", odd):
            path.write_bytes(damaged)
            await service.sidecar.reload()
            assert (await spectrum(client, service))["verdict"]["state"] == "healthy"
        path.unlink()
        await service.sidecar.reload()
        assert (await spectrum(client, service))["reference"] is None
        assert [it.name for it in tmp_path.iterdir()] == []


async def test_a_failure_does_not_end_the_watch_on_references(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.watching.sidecar.LOOK", 0.01)
    async with start(references_dir=tmp_path, **SIDECAR) as (client, service):
        body = {"model": "theirs", "rows": rows_of(900, 10).tolist()}
        assert (await client.post("/observe", json=body)).status_code == 202
        with monkeypatch.context() as patch:
            patch.setattr("service.watching.sidecar.Sidecar._stamp", lambda *_: 1 / 0)
            async with asyncio.timeout(60):
                while "references not read again" not in caplog.text:
                    await asyncio.sleep(0.01)
        (tmp_path / "theirs.safetensors").write_bytes(save_tensors(a_reference().tensors()))
        async with asyncio.timeout(60):
            while service.sidecar.get("theirs").reference is None:
                await asyncio.sleep(0.01)


async def test_a_reference_needs_a_folder_a_name_and_the_admin_scope(start: Start, tmp_path: Path) -> None:
    body = save_tensors(a_reference().tensors())
    async with start(**SIDECAR) as (client, _):
        answer = await client.put("/admin/references/theirs", content=body)
        assert "FULLRANK_REFERENCES_DIR" in error_of(answer, 409, "no_references_dir")["message"]
    keys = ("observe=observe-key-1", "admin=admin-key-123")
    async with start(references_dir=tmp_path, api_keys=keys, **SIDECAR) as (client, _):
        for key, status in (("observe-key-1", 403), ("admin-key-123", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.put("/admin/references/theirs", content=body, headers=headers)).status_code == status
        assert (await client.put("/admin/references/..%2Fup", content=body, headers=headers)).status_code in (404, 422)
        assert (await client.put("/admin/references/.up", content=body, headers=headers)).status_code == 422


async def test_a_sidecar_serves_no_encoder_and_says_so(start: Start) -> None:
    async with start(**SIDECAR) as (client, service):
        assert (await client.get("/readyz")).json() == {"status": "ready", "role": "sidecar"}
        assert (await client.get("/info")).json()["encoder"] is None
        image = await client.post("/embed", content=b"x", headers={"content-type": "image/png"})
        assert "POST /observe" in error_of(image, 404, "no_encoder")["message"]
        reason = {"reason": "unready"}
        assert service.metrics.registry.get_sample_value("fullrank_rejected_images_total", reason) == 0
        swap = await client.post("/admin/encoders", json={"name": "alpha"})
        error_of(swap, 404, "no_encoder")
        error_of(await client.get("/spectrum"), 404, "no_such_model")
        assert (await client.get("/v1/models")).json()["data"] == []
        assert (await client.post("/observe", json={"model": "theirs", "rows": [[1.0, 2.0]]})).status_code == 202
        assert (await client.get("/spectrum")).json()["model"] == "theirs"
        assert (await client.get("/metrics")).status_code == 200
        wide = save({"rows": np.ones((1, MAX_DIMENSION), np.float32)})
        refused = await client.post("/observe?model=wide", content=wide, headers=TENSORS)
        assert "max_observed_bytes" in error_of(refused, 422, "too_many_models")["message"]
        await service.reload()


async def test_the_client_hands_rows_over_in_parts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullrank.conversation.BATCH_BYTES", 8192)
    async with start(**SIDECAR) as (http, service):
        client = AsyncClient("http://localhost")
        await client._http.aclose()
        client._http = http
        rows = rows_of(500, 1)
        await client.observe("theirs", rows, keys=[f"key {i % 400}" for i in range(500)], inputs=rows[:, :4])
        seen = await spectrum(http, service)
        assert (seen["windows"]["300"]["rows"], seen["counters"]["rows"]["duplicate"]) == (400, 100)
        with pytest.raises(ValueError, match="keys: expected 500"):
            await client.observe("theirs", rows, keys=[1])
        with pytest.raises(ValueError, match="rows: expected numbers"):
            await client.observe("theirs", np.array(["x"]))
        with pytest.raises(EmbeddingError, match="have 16 dimensions, not 4"):
            await client.observe("theirs", rows[:, :4])
        with pytest.raises(EmbeddingError, match="the reference has none"):
            await client.observe("theirs", canary=rows)


async def test_an_arrow_stream_is_observed(start: Start) -> None:
    pa = pytest.importorskip("pyarrow")
    rows = pa.FixedSizeListArray.from_arrays(pa.array(rows_of(300, 1).reshape(-1)), D)
    table, sink = pa.table({"rows": rows, "keys": np.arange(300) % 200}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body, headers = sink.getvalue().to_pybytes(), {"content-type": "application/vnd.apache.arrow.stream"}
    async with start(**SIDECAR) as (client, service):
        sent = await client.post("/observe?model=theirs", content=body, headers=headers)
        assert (sent.status_code, sent.json()) == (
            202,
            {"model": "theirs", "rows": 300, "watched": 300, "dimension": D},
        )
        seen = await spectrum(client, service)
        assert (seen["windows"]["300"]["rows"], seen["counters"]["rows"]["duplicate"]) == (200, 100)
        cut = await client.post("/observe?model=theirs", content=body[:-300], headers=headers)
        assert error_of(cut, 422, "invalid_field")["field"] == "body"


async def test_of_several_keys_that_post_none_brings_more_than_its_share(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of 40 rows a second each of two senders has 10, and 600 at once; one alone has what it sends."""
    now = 0.0
    monkeypatch.setattr("service.watching.sidecar.time", SimpleNamespace(monotonic=lambda: now))
    random = np.random.default_rng(11)

    async def watched(client: httpx.AsyncClient, key: str, n: int, **others: Any) -> int:
        rows = random.normal(size=(n, D)).astype(np.float32)
        inputs = np.concatenate((rows[:, :2], rows[:, :1] + rows[:, 1:2]), 1)
        body = save({"rows": rows, "keys": random.integers(2**60, size=n), "inputs": inputs, **others})
        headers = TENSORS | {"authorization": f"Bearer {key}"}
        answer = await client.post("/observe?model=theirs", content=body, headers=headers)
        assert answer.status_code == 202, answer.text
        assert answer.json()["rows"] == n
        got: int = answer.json()["watched"]
        return got

    async with start(api_keys=("observe=first-key", "observe=second-key"), monitor_rate=40.0, **SIDECAR) as (
        client,
        service,
    ):
        assert [await watched(client, "first-key", 5000) for _ in range(3)] == [5000] * 3
        assert await watched(client, "second-key", 500) == 500
        assert await watched(client, "second-key", 500) == 100
        assert await watched(client, "first-key", 5000) == 600  # what it brought alone is not held against it
        assert await watched(client, "first-key", 5000) == 0
        now += 20.0
        assert [await watched(client, key, 500) for key in ("first-key", "second-key")] == [200, 200]
        monitor = service.sidecar.get("theirs")
        assert await asyncio.to_thread(monitor.flush, 120)
        assert sum(monitor.counters.rows.values()) == 15000 + 600 + 600 + 400
        left = service.metrics.registry.get_sample_value("fullrank_unsampled_images_total")
        assert left == monitor.counters.unsampled == 400 + 4400 + 5000 + 300 + 300
        now += 301.0  # the shortest window later the other is forgotten
        assert await watched(client, "second-key", 5000) == 5000
