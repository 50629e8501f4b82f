"""No header, whatever it holds, is a fault of the service; what can be asked for with GET can be with HEAD."""

import asyncio
import io

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.encoders.registry import Service
from tests.support.app import Start, error_of
from tests.support.images import as_files, as_json, encoded, pictures

pytestmark = pytest.mark.anyio
PNG = encoded(pictures(1)[0])
CHARSETS = ("undefined", "idna", "punycode", "hex", "no-such-thing", "utf-16", "\xe9")
NAMES = (
    "accept",
    "accept-charset",
    "accept-encoding",
    "authorization",
    "baggage",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "if-none-match",
    "inference-header-content-length",
    "origin",
    "range",
    "traceparent",
    "tracestate",
    "transfer-encoding",
    "x-forwarded-for",
    "x-request-id",
    "x-request-timeout",
)
VALUES = st.one_of(
    st.sampled_from(
        [
            *("", " ", "*", "*/*;q=nan", "*/*;q=1e999", "application/x-npy;q=-1", "a/b;q=", ";;;", ",,,", "=", '"'),
            *("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=b; charset=x"),
            *(
                f"multipart/form-data; boundary=b; charset={it}"
                for it in ("undefined", "idna", "hex", "utf-16", "\xe9")
            ),
            *("image/", "application/json; charset=undefined", "application/x-npy", "text/plain"),
            *("nan", "inf", "-1", "1e-320", "0x10", "1_0", "9" * 5000, "\xb2", "\xb9\xb2"),
            *("Bearer", "Bearer ", "Bearer \xff", "Basic eDp5", "gzip", "identity, gzip", "[::1", "[::1]:x", "a:b:c"),
            *("http://[::1", "null", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-zz", "a=b,", "chunked"),
        ]
    ),
    st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=40),
)
HEADERS = st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1)
REQUESTS = ("/embed", "/v1/embeddings", "/v2/models/alpha/infer", "/observe", "/admin/encoders", "/nowhere", "/metrics")
BODIES = (PNG, b"{}", b"", b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\nx\r\n--b--\r\n')


async def test_no_header_is_a_fault_of_ours(shared: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = shared
    loop = asyncio.get_running_loop()
    seen: set[int] = set()

    @settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(
        st.sampled_from(REQUESTS), st.sampled_from(BODIES), st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1)
    )
    def fuzz(path: str, body: bytes, headers: dict[str, str]) -> None:
        method = "GET" if path == "/metrics" else "POST"
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        request = client.build_request(method, path, content=body, headers=raw)
        response = asyncio.run_coroutine_threadsafe(client.send(request), loop).result(240)
        seen.add(response.status_code)
        assert response.status_code < 500, (path, body[:20], headers, response.text)

    await asyncio.to_thread(fuzz)
    assert {200, 415, 422} <= seen


@pytest.mark.parametrize("charset", CHARSETS)
async def test_a_charset_nobody_can_read_is_refused_or_left_aside(
    shared: tuple[httpx.AsyncClient, Service], charset: str
) -> None:
    request = shared[0].build_request("POST", "/embed", files=as_files([PNG]), data={"normalize": "false"})
    kind = request.headers["content-type"].encode() + b"; charset=" + charset.encode("latin-1")
    response = await shared[0].post("/embed", content=request.read(), headers=[(b"content-type", kind)])
    if response.status_code == 400:
        assert error_of(response, 400, "malformed_multipart")["field"] == "Content-Type"
    else:  # one that Python can read with, whatever comes of it
        assert response.status_code in (200, 422)


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics", "/info", "/"]
)
async def test_head_is_get_without_a_body(shared: tuple[httpx.AsyncClient, Service], path: str) -> None:
    client, service = shared
    whole, head = await client.get(path), await client.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    sample = service.metrics.registry.get_sample_value
    assert (sample("fullrank_requests_total", {"route": path, "code": "200"}) or 0) >= 2
    assert (await client.head("/embed")).status_code == 405


def a_file(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("TIFF", a_file("TIFF")),
        ("AVIF", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64)),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)),
        ("HEIC", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(64)),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a drawing -->\n<svg width="9" height="9"></svg>'),
        ("JPEG XL", b"\xff\x0a" + bytes(64)),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64)),
        ("PDF", b"%PDF-1.7\n" + bytes(64)),
    ],
)
async def test_a_format_that_is_not_read_is_called_by_its_name(
    shared: tuple[httpx.AsyncClient, Service], name: str, data: bytes
) -> None:
    error = error_of(await shared[0].post("/embed", content=data), 422, "not_an_image")
    assert f"this is {name}, which is not decoded" in error["message"]
    assert "JPEG" in error["message"]


async def test_what_only_looks_like_a_known_format_is_no_image(shared: tuple[httpx.AsyncClient, Service]) -> None:
    for data in (b"<?xml version='1.0'?><html/>", b"\0\0\0\x18ftypmp42\0\0\0\0", b"hello"):
        error = error_of(await shared[0].post("/embed", content=data), 422, "not_an_image")
        assert "no image in a known format" in error["message"]


def spellings(data: bytes) -> dict[str, str]:
    """The same bytes as clients write them."""
    plain = as_json([data])["images"][0]
    lines = "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76)) + "\r\n"
    safe = plain.replace("+", "-").replace("/", "_")
    escaped = plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    return {
        "plain": plain,
        "lines": lines,
        "unpadded": plain.rstrip("="),
        "safe": safe,
        "safe, unpadded": safe.rstrip("="),
        "data": f"data:image/png;base64,{plain}",
        "data, lines": f"data:image/png;base64,{lines}",
        "data, safe": f"DATA:image/png;charset=utf-8;BASE64,{safe.rstrip('=')}",
        "data, escaped": f"data:image/png;base64,{escaped}",
        "space before": f"\n  {plain}",
    }


async def test_base64_is_read_as_clients_write_it_on_every_route(shared: tuple[httpx.AsyncClient, Service]) -> None:
    client, _ = shared
    noise = np.random.default_rng(3).integers(0, 256, (28, 28), np.uint8)
    image = next(data for data in (encoded(noise) + bytes(i) for i in range(3)) if len(data) % 3 == 1)
    texts = spellings(image)
    assert {"+", "/", "="} <= set(texts["plain"])  # else the alphabet is not tried
    expected = (await client.post("/embed", content=image)).json()["embeddings"][0]
    for name, text in texts.items():
        rows = [(await client.post("/embed", json={"images": [text]})).json()["embeddings"][0]]
        openai = await client.post("/v1/embeddings", json={"model": "alpha", "input": text})
        rows.append(openai.json()["data"][0]["embedding"])
        tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [text]}
        infer = await client.post("/v2/models/alpha/infer", json={"inputs": [tensor]})
        rows.append(infer.json()["outputs"][0]["data"])
        np.testing.assert_allclose(rows, [expected] * 3, atol=1e-6, err_msg=name)
    for wrong in ("no!base64", "AAAAA", "AA=A", "data:image/png;base64", "\u0661\u0662"):
        error_of(await client.post("/embed", json={"images": [wrong]}), 422, "bad_base64")


@pytest.mark.parametrize(
    "rows",
    [
        [["1", "2"]],
        [[1.0, None]],
        [[True, False]],
        [[1.0, [2.0]]],
        [["nan", 1.0]],
        [1.0, 2.0],
        "12",
        {"0": [1.0, 2.0]},
        [[1.0, 2.0], [1.0, "2"]],
    ],
)
async def test_rows_are_numbers(shared: tuple[httpx.AsyncClient, Service], rows: object) -> None:
    error = error_of(await shared[0].post("/observe", json={"model": "theirs", "rows": rows}), 422, "invalid_field")
    assert error["field"].startswith("rows")


async def test_a_deadline_that_the_client_set_itself_is_its_own(start: Start) -> None:
    async with start() as (client, service):
        sample = service.metrics.registry.get_sample_value
        answer = await client.post("/embed", content=PNG, headers={"x-request-timeout": "0.0000001"})
        assert error_of(answer, 408, "client_deadline")["field"] == "X-Request-Timeout"
        body = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": as_json([PNG])["images"]}]}
        answer = await client.post("/v2/models/alpha/infer", json=body | {"parameters": {"timeout": 1}})
        assert answer.status_code == 408
        reasons = {
            it: sample("fullrank_rejected_images_total", {"reason": it}) for it in ("deadline", "client_deadline")
        }
        assert reasons == {"deadline": 0, "client_deadline": 2}
        assert sample("fullrank_requests_total", {"route": "/embed", "code": "504"}) == 0
