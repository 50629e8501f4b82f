"""/v2 as the protocol says: Triton's own client against a real uvicorn, and what it refuses."""

import base64
import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from models import artifact
from models.embedder import Embedder, normalize
from service.encoders.registry import Service
from service.settings import Settings
from tests.support.app import Start, held
from tests.support.images import DIMENSION, SIZE, encoded, pictures
from tests.support.process import running

SMALL, LARGE = pictures(3, seed=8), pictures(3, seed=9, size=50)
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def url(settings: Callable[..., Settings]) -> Iterator[str]:
    with running(settings(max_images_per_request=4)) as (address, _):
        yield address.removeprefix("http://")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    it = triton.InferenceServerClient(url)
    yield it
    it.close()


def expected(settings: Callable[..., Settings], images: np.ndarray) -> NDArray[np.float32]:
    """(n, d) unit rows by the offline path."""
    import torch

    embedder = Embedder(artifact.load(settings().encoder))
    return normalize(embedder.embed_arrays(torch.from_numpy(images[:, None]))).numpy()


def tensor(name: str, images: np.ndarray, binary: bool) -> triton.InferInput:
    if name == "pixels":
        array, datatype = images[:, None], "UINT8"
    else:
        files = [encoded(image) for image in images]
        array, datatype = np.array(files if binary else list(map(base64.b64encode, files)), np.object_), "BYTES"
    it = triton.InferInput(name, list(array.shape), datatype)
    it.set_data_from_numpy(array, binary_data=binary)
    return it


def test_health_and_metadata(client: triton.InferenceServerClient, settings: Callable[..., Settings]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("alpha")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("alpha")
    assert metadata["outputs"] == [{"name": "embeddings", "datatype": "FP32", "shape": [-1, DIMENSION]}]
    (revision,) = metadata["versions"]
    assert revision == artifact.load(settings().encoder).card.revision
    assert client.is_model_ready("alpha", revision)
    assert not client.is_model_ready("beta")
    assert not client.is_model_ready("alpha", "other")
    with pytest.raises(InferenceServerException, match=r"no encoder 'beta' is in service; there are: alpha@"):
        client.get_model_metadata("beta")


@pytest.mark.parametrize("images", [SMALL, LARGE], ids=["at size", "to be resized"])
@pytest.mark.parametrize("name", ["images", "pixels"])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_both_inputs_both_ways(
    client: triton.InferenceServerClient,
    settings: Callable[..., Settings],
    images: np.ndarray,
    name: str,
    binary_in: bool,
    binary_out: bool | None,
) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("embeddings", binary_data=binary_out)]
    result = client.infer("alpha", [tensor(name, images, binary_in)], outputs=outputs, request_id="mine")
    np.testing.assert_allclose(result.as_numpy("embeddings"), expected(settings, images), atol=2e-6)
    response = result.get_response()
    assert (response["model_name"], response["id"]) == ("alpha", "mine")
    assert ("data" in response["outputs"][0]) == (binary_out is False)


def test_parameters(client: triton.InferenceServerClient) -> None:
    images = [tensor("pixels", SMALL, True)]
    version = client.get_model_metadata("alpha")["versions"][0]
    raw = client.infer("alpha", images, version, parameters={"normalize": False, "mine": 1}).as_numpy("embeddings")
    unit = client.infer("alpha", images).as_numpy("embeddings")
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)
    assert not np.allclose(raw, unit)
    with pytest.raises(InferenceServerException, match="deadline"):
        client.infer("alpha", images, timeout=1)


def test_what_the_client_sends_wrong_is_said_in_words(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"at most 4 images") as caught:
        client.infer("alpha", [tensor("pixels", pictures(5), True)])
    assert caught.value.status() == "422"
    with pytest.raises(InferenceServerException, match="no encoder"):
        client.infer("beta", [tensor("pixels", SMALL, True)])
    bad = triton.InferInput("images", [2], "BYTES")
    bad.set_data_from_numpy(np.array([encoded(SMALL[0]), b"hello"], np.object_))
    with pytest.raises(InferenceServerException, match=r"inputs.images\[1\]: the bytes are no image"):
        client.infer("alpha", [bad])
    with pytest.raises(InferenceServerException, match="Content-Encoding 'gzip'"):
        client.infer("alpha", [tensor("pixels", SMALL, True)], request_compression_algorithm="gzip")


PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": list(range(64))}
FILES = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(encoded(SMALL[0])).decode()]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({"inputs": []}, "inputs"),
    "two inputs": ({"inputs": [PIXELS, FILES]}, "inputs"),
    "unknown input": ({"inputs": [PIXELS | {"name": "x"}]}, "inputs.0.name"),
    "unknown output": ({"inputs": [PIXELS], "outputs": [{"name": "x"}]}, "outputs.0.name"),
    "wrong datatype": ({"inputs": [PIXELS | {"datatype": "BYTES"}]}, "datatype must be UINT8"),
    "another datatype": ({"inputs": [PIXELS | {"datatype": "FP32"}]}, "datatype"),
    "two channels": ({"inputs": [PIXELS | {"shape": [1, 2, 4, 8]}]}, "1 or 3"),
    "three dimensions": ({"inputs": [PIXELS | {"shape": [1, 8, 8]}]}, "1 or 3"),
    "no shape": ({"inputs": [PIXELS | {"shape": []}]}, "no images"),
    "no images": ({"inputs": [PIXELS | {"shape": [0, 1, 8, 8]}]}, "greater than 0"),
    "negative": ({"inputs": [PIXELS | {"shape": [-1, 1, -8, 8]}]}, "greater than 0"),
    "overflowing": ({"inputs": [PIXELS | {"shape": [1, 1, 2**62, 2**62]}]}, "elements, not 64"),
    "thousands of digits": ({"inputs": [PIXELS | {"shape": [1, 1, "9" * 4000, "9" * 4000]}]}, "1 or 3"),
    "too few": ({"inputs": [PIXELS | {"data": [1]}]}, "means 64 elements, not 1"),
    "too small": ({"inputs": [PIXELS | {"shape": [1, 1, 4, 16]}]}, "at least 8"),
    "above 255": ({"inputs": [PIXELS | {"data": [256] * 64}]}, "0 to 255"),
    "fractions": ({"inputs": [PIXELS | {"data": [0.5] * 64}]}, "0 to 255"),
    "booleans": ({"inputs": [PIXELS | {"data": [True] * 64}]}, "0 to 255"),
    "huge": ({"inputs": [PIXELS | {"data": [2**63] * 64}]}, "0 to 255"),
    "ragged": ({"inputs": [PIXELS | {"data": [[1, 2], [3]]}]}, "nested evenly"),
    "text": ({"inputs": [PIXELS | {"data": "abc"}]}, "data"),
    "no data": ({"inputs": [PIXELS | {"data": None}]}, "binary_data_size"),
    "data twice": ({"inputs": [PIXELS | {"parameters": {"binary_data_size": 64}}]}, "either"),
    "no tail": ({"inputs": [PIXELS | {"data": None, "parameters": {"binary_data_size": 64}}]}, "0 follow"),
    "more files than said": ({"inputs": [FILES | {"data": FILES["data"] * 2}]}, "means 1 elements, not 2"),
    "files nested and not": ({"inputs": [FILES | {"data": [FILES["data"], 7]}]}, "means 1 elements, not 2"),
    "a file that is a number": ({"inputs": [FILES | {"data": [7]}]}, "base64 string"),
    "a file that is a URL": ({"inputs": [FILES | {"data": ["http://a.org/x.png"]}]}, "fetches no URLs"),
    "square of files": ({"inputs": [FILES | {"shape": [2, 2]}]}, "shape must be [n]"),
    "negative timeout": ({"inputs": [FILES], "parameters": {"timeout": -1}}, "parameters.timeout"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("case", BAD)
async def test_bad_json_is_refused_in_the_protocols_shape(shared: tuple[httpx.AsyncClient, Service], case: str) -> None:
    body, words = BAD[case]
    response = await shared[0].post("/v2/models/alpha/infer", json=body)
    assert response.status_code == 422, response.text
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [0, 2**63, "9" * 400])
async def test_a_timeout_beyond_the_services_limit_changes_nothing(
    shared: tuple[httpx.AsyncClient, Service], timeout: int | str
) -> None:
    body = {"inputs": [FILES], "parameters": {"timeout": timeout}}
    response = await shared[0].post("/v2/models/alpha/infer", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("tail", "size", "length", "words"),
    [
        (b"\x01", 1, None, "ends within an element's length"),
        (struct.pack("<I", 9) + b"short", 9, None, "ends within an element"),
        (struct.pack("<I", 2**32 - 1), 4, None, "ends within an element"),
        (struct.pack("<I", 1) + b"a" + struct.pack("<I", 0), 9, None, "means 1 elements, not 2"),
        (b"", 0, None, "means 1 elements, not 0"),
        (b"abc", 2, None, "says 2 bytes, but 3 follow"),
        (b"abc", -1, None, "greater than or equal to 0"),
        (b"abc", 3, "-1", "Inference-Header-Content-Length"),
        (b"abc", 3, "99999999999999999999", "Inference-Header-Content-Length"),
        (b"abc", 3, "\u0663".encode(), "Inference-Header-Content-Length"),
        (b"abc", 3, "3", "not JSON"),
    ],
)
async def test_bad_tails_are_refused(
    shared: tuple[httpx.AsyncClient, Service], tail: bytes, size: int, length: str | bytes | None, words: str
) -> None:
    import orjson

    head = orjson.dumps({"inputs": [FILES | {"data": None, "parameters": {"binary_data_size": size}}]})
    headers = {LENGTH: str(len(head)) if length is None else length}
    response = await shared[0].post("/v2/models/alpha/infer", content=head + tail, headers=headers)
    assert response.status_code in (400, 422), response.text
    assert words in response.json()["error"]


@pytest.mark.anyio
async def test_failures_of_every_kind_have_the_protocols_shape(start: Start) -> None:
    request = {"inputs": [FILES]}
    async with start(api_key="correct horse", max_body_bytes=2048) as (client, service):
        path, key = "/v2/models/alpha/infer", {"authorization": "Bearer correct horse"}
        refused = await client.post(path, json=request)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert isinstance(refused.json()["error"], str)
        assert (await client.post(path, json=request, headers=key)).status_code == 200
        for status, response in (
            (413, await client.post(path, content=b"x" * 4096, headers=key)),
            (400, await client.post(path, content=b"{", headers=key)),
            (404, await client.get("/v2/nothing")),
            (405, await client.get(path)),
        ):
            assert response.status_code == status
            assert isinstance(response.json()["error"], str)
        service.drain()
        unready = await client.get("/v2/health/ready")
        assert (unready.status_code, unready.json()) == (503, {"error": "the service is draining"})
        assert (await client.get("/v2/models/alpha/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200


@pytest.mark.anyio
async def test_when_full_it_says_when_to_come_again(start: Start) -> None:
    import asyncio

    from tests.support.app import pending

    async with start(max_pending_images=1, max_images_per_request=1) as (client, service):
        with held(service.current):
            first = asyncio.create_task(client.post("/v2/models/alpha/infer", json={"inputs": [FILES]}))
            await pending(service, 1)
            full = await client.post("/v2/models/alpha/infer", json={"inputs": [FILES]})
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
            assert isinstance(full.json()["error"], str)
        assert (await first).status_code == 200


def test_pixels_at_size_are_served_as_they_are(
    client: triton.InferenceServerClient, settings: Callable[..., Settings]
) -> None:
    rgb = np.repeat(SMALL[:, None], 3, axis=1)  # a grey encoder turns RGB to grey, as it does a file's
    assert rgb.shape == (3, 3, SIZE, SIZE)
    it = triton.InferInput("pixels", list(rgb.shape), "UINT8")
    it.set_data_from_numpy(rgb)
    result = client.infer("alpha", [it]).as_numpy("embeddings")
    np.testing.assert_allclose(result, expected(settings, SMALL), atol=2e-6)
