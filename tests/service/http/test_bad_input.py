"""Every bad input is a 4xx in the one shape, names its field and remedy, and the service goes on."""

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.encoders.registry import Service
from tests.support.app import Start, error_of
from tests.support.images import as_files, as_json, encoded, pictures

pytestmark = pytest.mark.anyio
GOOD = encoded(pictures(1)[0])
PNG = {"content-type": "image/png"}
JSON = {"content-type": "application/json"}


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header declares side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, size=128)[0]).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
async def service(start: Start) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    limits = {"max_images_per_request": 4, "max_body_bytes": 65536, "max_pixels": 1_000_000}
    async with start(**limits) as both:
        yield both


CASES: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "no image": ({"content": b"hello, world", "headers": PNG}, 422, "not_an_image", "body"),
    "truncated JPEG": ({"content": truncated(), "headers": PNG}, 422, "damaged_image", "body"),
    "1x1 PNG": ({"content": encoded(pictures(1, size=1)[0]), "headers": PNG}, 422, "image_too_small", "body"),
    "decompression bomb": ({"content": bomb(), "headers": PNG}, 422, "image_too_large", "body"),
    "small bomb": ({"content": bomb(2000), "headers": PNG}, 422, "image_too_large", "body"),
    "empty body": ({"content": b"", "headers": PNG}, 400, "empty_body", "body"),
    "wrong content type": (
        {"content": GOOD, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        415,
        "unsupported_media_type",
        "Content-Type",
    ),
    "nothing we can answer with": (
        {"content": GOOD, "headers": PNG | {"accept": "text/html"}},
        406,
        "not_acceptable",
        "Accept",
    ),
    "deadline that is no number": (
        {"content": GOOD, "headers": PNG | {"x-request-timeout": "soon"}},
        422,
        "invalid_field",
        "X-Request-Timeout",
    ),
    "body too large": ({"content": GOOD + b"x" * 70_000, "headers": PNG}, 413, "body_too_large", "body"),
    "malformed JSON": ({"content": b'{"images": [', "headers": JSON}, 400, "malformed_json", "body"),
    "JSON that is no object": ({"json": [1, 2]}, 422, "invalid_field", "body"),
    "empty JSON body": ({"content": b"", "headers": JSON}, 400, "malformed_json", "body"),
    "no images": ({"json": {}}, 422, "invalid_field", "images"),
    "empty images": ({"json": {"images": []}}, 422, "no_images", "images"),
    "images is a string": ({"json": {"images": text(GOOD)}}, 422, "invalid_field", "images"),
    "an image is a number": ({"json": {"images": [text(GOOD), 7]}}, 422, "invalid_field", "images[1]"),
    "not base64": ({"json": {"images": [text(GOOD), "no!base64"]}}, 422, "bad_base64", "images[1]"),
    "not ASCII": ({"json": {"images": ["é"]}}, 422, "bad_base64", "images[0]"),
    "data URI without base64": ({"json": {"images": ["data:image/png,xx"]}}, 422, "bad_base64", "images[0]"),
    "a URL": ({"json": {"images": ["https://example.org/x.png"]}}, 422, "no_urls", "images[0]"),
    "empty base64": ({"json": {"images": [""]}}, 422, "empty_image", "images[0]"),
    "bad image among good": ({"json": as_json([GOOD, GOOD, b"bad"])}, 422, "not_an_image", "images[2]"),
    "too many images": ({"json": as_json([GOOD] * 5)}, 422, "too_many_images", "images"),
    "too many files": ({"files": as_files([GOOD] * 5)}, 422, "too_many_images", "images"),
    "normalize is a string": ({"json": as_json([GOOD], normalize="maybe")}, 422, "invalid_field", "normalize"),
    "unknown encoding": ({"json": as_json([GOOD], encoding_format="f16")}, 422, "invalid_field", "encoding_format"),
    "encoding is a list": ({"json": as_json([GOOD], encoding_format=[])}, 422, "invalid_field", "encoding_format"),
    "unknown field": ({"json": as_json([GOOD], normalise=True)}, 422, "unknown_field", "normalise"),
    "unknown query": ({"params": {"x": "1"}, "content": GOOD, "headers": PNG}, 422, "unknown_field", "x"),
    "unknown file field": ({"files": [("image", ("a.png", GOOD))]}, 422, "unknown_field", "image"),
    "images as a plain part": ({"files": {"images": (None, "text")}}, 422, "invalid_field", "images"),
    "bad file among good": ({"files": as_files([GOOD, b"bad"])}, 422, "not_an_image", "images[1]"),
    "multipart without boundary": (
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        400,
        "malformed_multipart",
        "body",
    ),
    "malformed multipart": (
        {"content": b"--b\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
        "malformed_multipart",
        "body",
    ),
    "truncated multipart": (
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + GOOD,
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        400,
        "malformed_multipart",
        "body",
    ),
    "empty multipart": (
        {"content": b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        422,
        "no_images",
        "images",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_bad_input_is_refused_and_the_service_goes_on(
    service: tuple[httpx.AsyncClient, Service], case: str
) -> None:
    client, core = service
    request, status, code, field = CASES[case]
    error = error_of(await client.post("/embed", **request), status, code)
    assert error["field"] == field
    assert (await client.post("/embed", content=GOOD, headers=PNG)).status_code == 200
    assert core.admission.pending == 0


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
async def test_corrupted_images_are_never_our_fault(service: tuple[httpx.AsyncClient, Service], form: str) -> None:
    rng = np.random.default_rng(zlib.crc32(form.encode()))
    whole = encoded(pictures(1, size=40)[0], form)
    statuses = set()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(1, len(data)) :]
        response = await service[0].post("/embed", content=bytes(data), headers=PNG)
        statuses.add(response.status_code)
    assert statuses <= {200, 422}
    assert 422 in statuses


async def test_limits_are_in_the_message(service: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = service
    messages = {case: (await client.post("/embed", **CASES[case][0])).json()["error"]["message"] for case in CASES}
    for case, limit in (
        ("too many images", "4"),
        ("too many files", "4"),
        ("body too large", "65536"),
        ("small bomb", "1000000"),
        ("1x1 PNG", "8"),
    ):
        assert limit in messages[case]


async def test_a_chunked_body_is_cut_off_at_the_limit(service: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = service
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 16384
            yield b"x" * 16384

    error_of(await client.post("/embed", content=endless(), headers=PNG), 413, "body_too_large")
    assert sent <= 65536 + 2 * 16384


async def test_paths_and_methods_that_are_not_there(service: tuple[httpx.AsyncClient, Service]) -> None:
    client, core = service
    error_of(await client.get("/nothing/here"), 404, "not_found")
    response = await client.get("/embed")
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    sample = core.metrics.registry.get_sample_value
    assert sample("fullrank_requests_total", {"route": "other", "code": "404"}) == 1


async def test_an_unexpected_exception_tells_the_log_and_not_the_client(
    service: tuple[httpx.AsyncClient, Service], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, core = service
    monkeypatch.setattr(core.current, "embed", lambda pixels: 1 / 0)
    response = await client.post("/embed", content=GOOD, headers=PNG)
    assert error_of(response, 500, "internal")["field"] is None
    assert "division" not in response.text
    assert "division by zero" in caplog.text
    assert core.admission.pending == 0


async def test_an_embedding_that_is_not_finite_is_an_error_never_null(start: Start, encoders: Any) -> None:
    async with start(encoder=encoders / "broken", gate="off") as (client, core):
        error = error_of(await client.post("/embed", files=as_files([GOOD] * 2)), 500, "nonfinite_embedding")
        assert error["field"] == "images[0]"
        sample = core.metrics.registry.get_sample_value
        assert sample("fullrank_rejected_images_total", {"reason": "nonfinite"}) == 2
