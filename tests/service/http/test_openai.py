"""POST /v1/embeddings in OpenAI's shape, errors included."""

import base64
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from service.encoders.registry import Service
from service.settings import Settings
from tests.support.app import Start, held
from tests.support.images import DIMENSION, as_json, encoded, pictures
from tests.support.process import running

pytestmark = pytest.mark.anyio
IMAGES = [encoded(picture) for picture in pictures(3)]
TEXTS = ["data:image/png;base64," + base64.b64encode(image).decode() for image in IMAGES]


async def test_it_gives_what_embed_gives_in_both_encodings(start: Start) -> None:
    async with start() as (client, service):
        expected = (await client.post("/embed", json=as_json(IMAGES))).json()["embeddings"]
        body = {"model": "alpha", "input": TEXTS, "user": "u", "dimensions": DIMENSION}
        floats = (await client.post("/v1/embeddings", json=body)).json()
        assert (floats["object"], floats["model"], set(floats["usage"])) == (
            "list",
            "alpha",
            {"prompt_tokens", "total_tokens"},
        )
        assert [item["index"] for item in floats["data"]] == [0, 1, 2]
        assert {item["object"] for item in floats["data"]} == {"embedding"}
        np.testing.assert_allclose([item["embedding"] for item in floats["data"]], expected, atol=1e-6)
        packed = (await client.post("/v1/embeddings", json=body | {"encoding_format": "base64"})).json()["data"]
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed]
        np.testing.assert_allclose(rows, expected, atol=1e-6)
        one = {"model": f"alpha@{service.current.revision}", "input": TEXTS[0], "encoding_format": None}
        single = (await client.post("/v1/embeddings", json=one)).json()["data"]
        np.testing.assert_allclose(single[0]["embedding"], expected[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"model": None}, 422, "model"),
        ({"input": []}, 422, "input"),
        ({"input": [1, 2]}, 422, "input[0]"),
        ({"input": {"a": 1}}, 422, "input"),
        ({"input": ["hello"]}, 422, "input[0]"),
        ({"input": TEXTS * 50}, 422, "input"),
        ({"dimensions": 7}, 400, "dimensions"),
        ({"dimensions": 0}, 400, "dimensions"),
        ({"dimensions": True}, 400, "dimensions"),
        ({"dimensions": "8"}, 400, "dimensions"),
        ({"dimensions": DIMENSION + 1}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 422, "encoding_format"),
        ({"encoding_format": 0}, 422, "encoding_format"),
    ],
)
async def test_errors_have_openais_shape(
    shared: tuple[httpx.AsyncClient, Service], change: dict[str, Any], status: int, param: str
) -> None:
    response = await shared[0].post("/v1/embeddings", json={"model": "alpha", "input": TEXTS} | change)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


async def test_other_names_lead_to_the_encoders_in_service(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    aliases = "text-embedding-3-small=default, clip=beta, gone=nobody"
    async with start(encoders="beta", aliases=aliases) as (client, service):
        assert "the alias gone means nobody" in caplog.text
        alpha, beta = (it.revision for it in service.in_service())
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert {it["id"]: (it["root"], it["revision"]) for it in listed["data"]} == {
            "alpha": ("alpha", alpha),
            "beta": ("beta", beta),
            "default": ("alpha", alpha),
            "text-embedding-3-small": ("alpha", alpha),
            "clip": ("beta", beta),
        }
        for asked, name, revision in (
            ("default", "alpha", alpha),
            ("text-embedding-3-small", "alpha", alpha),
            ("clip", "beta", beta),
            (f"clip@{beta}", "beta", beta),
        ):
            answer = await client.post("/v1/embeddings", json={"model": asked, "input": TEXTS[0]})
            assert answer.status_code == 200, answer.text
            assert (answer.json()["model"], answer.json()["revision"]) == (name, revision)
            assert (answer.headers["x-model"], answer.headers["x-revision"]) == (name, revision)
            embedded = await client.post("/embed", json=as_json(IMAGES, model=asked))
            assert (embedded.json()["model"], embedded.json()["revision"]) == (name, revision)
            path, _, version = asked.partition("@")
            metadata = await client.get(f"/v2/models/{path}" + (f"/versions/{version}" if version else ""))
            assert metadata.json()["name"] == name
        one = (await client.get("/v1/models/clip")).json()
        assert (one["id"], one["root"], one["object"]) == ("clip", "beta", "model")
        for missing in ("gone", "nobody", f"clip@{alpha}", "long" * 20_000):
            answer = await client.post("/v1/embeddings", json={"model": missing, "input": TEXTS[0]})
            assert answer.status_code == 404
            assert len(answer.content) < 1500
            assert answer.json()["error"]["code"] == "model_not_found"


async def test_an_encoder_called_default_is_no_alias(start: Start, encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "beta", tmp_path / "default")
    card = json.loads((tmp_path / "default" / "encoder.json").read_text())
    (tmp_path / "default" / "encoder.json").write_text(json.dumps(card | {"name": "default"}))
    async with start(encoders=str(tmp_path / "default")) as (client, service):
        answer = await client.post("/v1/embeddings", json={"model": "default", "input": TEXTS[0]})
        assert answer.json()["model"] == "default"
        assert answer.json()["revision"] == service.in_service()[1].revision


async def test_a_key_is_asked_for_in_openais_shape(start: Start) -> None:
    async with start(api_key="correct horse") as (client, _):
        body = {"model": "alpha", "input": TEXTS}
        refused = await client.post("/v1/embeddings", json=body)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "invalid_request_error"
        headers = {"authorization": "Bearer correct horse"}
        assert (await client.post("/v1/embeddings", json=body, headers=headers)).status_code == 200


def nested(source: Path, folder: Path, lengths: list[int]) -> Path:
    """A copy of an encoder whose card says that it was trained for these nested dimensions."""
    shutil.copytree(source, folder)
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(card | {"nested_dimensions": lengths}))
    return folder


async def test_an_encoder_trained_for_nested_dimensions_gives_its_first_ones(
    start: Start, encoders: Path, tmp_path: Path
) -> None:
    async with start(encoder=nested(encoders / "alpha", tmp_path / "alpha", [4, 16])) as (client, service):
        body = {"model": "alpha", "input": TEXTS}
        await client.post("/v1/embeddings", json=body | {"dimensions": 4})
        monitor = service.current.monitor
        assert monitor is not None
        assert service.engine.settle(120)
        assert monitor.flush(120)
        seen = monitor.moments()
        whole = (await client.post("/v1/embeddings", json=body)).json()
        rows = np.array([item["embedding"] for item in whole["data"]], np.float64)
        assert seen.count == len(rows)  # the monitor sees whole rows, whatever a client asks for
        np.testing.assert_allclose(seen.mean().numpy(), rows.mean(0), atol=1e-6)
        for length in (1, 4, 7, DIMENSION - 1, DIMENSION):  # between the trained lengths too, as at OpenAI's
            answer = await client.post("/v1/embeddings", json=body | {"dimensions": length})
            assert answer.status_code == 200, answer.text
            short = np.array([item["embedding"] for item in answer.json()["data"]], np.float64)
            first = rows[:, :length]
            np.testing.assert_allclose(short, first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-6)
            assert answer.json()["revision"] == whole["revision"]
        for length in (0, -1, DIMENSION + 1, 2.0, True, "4", [4]):
            answer = await client.post("/v1/embeddings", json=body | {"dimensions": length})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", "dimensions")
            assert f"from 1 to {DIMENSION}" in error["message"]


def test_the_official_client_works(settings: Callable[..., Settings]) -> None:
    limits = {"max_pending_images": 4, "max_images_per_request": 4}
    with running(settings(api_key="correct horse", **limits)) as (url, server):
        headers = {"authorization": "Bearer correct horse"}
        rows = httpx.post(url + "/embed", json=as_json(IMAGES), headers=headers).json()["embeddings"]
        client = OpenAI(base_url=url + "/v1", api_key="correct horse", max_retries=0)
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(model="alpha", input=TEXTS, **encoding)  # type: ignore[call-overload]
            assert [item.index for item in answer.data] == [0, 1, 2]
            values = [item.embedding for item in answer.data]
            if encoding.get("encoding_format") == "base64":  # asked for by name, it is handed on as it came
                values = [np.frombuffer(base64.b64decode(value), "<f4") for value in values]
            np.testing.assert_allclose(values, rows, atol=1e-6)
        one = client.embeddings.create(model="alpha", input=TEXTS[0], dimensions=DIMENSION, user="me")
        np.testing.assert_allclose(one.data[0].embedding, rows[0], atol=1e-6)

        with pytest.raises(openai.BadRequestError, match=r"not trained for nested .* leave dimensions out") as short:
            client.embeddings.create(model="alpha", input=TEXTS[0], dimensions=4)
        assert short.value.param == "dimensions"

        with pytest.raises(openai.NotFoundError, match="no encoder 'gpt'") as unknown:
            client.embeddings.create(model="gpt", input=TEXTS)
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.UnprocessableEntityError, match="at most 4 images"):
            client.embeddings.create(model="alpha", input=TEXTS * 2)
        with pytest.raises(openai.AuthenticationError, match="needs the service's key"):
            client.with_options(api_key="wrong").embeddings.create(model="alpha", input=TEXTS)

        with held(server.service.current) as hold:
            filling = threading.Thread(
                target=client.embeddings.create, kwargs={"model": "alpha", "input": [TEXTS[0]] * 4}
            )
            filling.start()
            assert hold.entered.wait(120)
            with pytest.raises(openai.RateLimitError, match="4 images are pending"):
                client.embeddings.create(model="alpha", input=TEXTS)
            threading.Timer(0.2, hold.release.set).start()
            patient = client.with_options(max_retries=100)  # it honours Retry-After
            assert len(patient.embeddings.create(model="alpha", input=TEXTS).data) == 3
            filling.join()
