"""Request ids, log lines, cross-origin rules, and a real process that logs JSON and reads its encoder again."""

import json
import logging
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from service.logs import JsonFormatter, TextFormatter, request_id
from tests.support.app import Start, error_of
from tests.support.images import as_files, encoded, pictures
from tests.support.process import Replica, replica, until

IMAGES = [encoded(picture) for picture in pictures(3)]
ROOT = Path(__file__).parents[2]


@pytest.mark.anyio
async def test_a_sane_request_id_is_kept_and_another_replaced(start: Start) -> None:
    async with start() as (client, _):
        for given in ("abc-1.2:3/4+=_", "x" * 128):
            assert (await client.get("/healthz", headers={"x-request-id": given})).headers["x-request-id"] == given
        made = set()
        for given in ("", "a b", "x" * 129, 'a"b', "é"):
            headers = {"x-request-id": given.encode("latin-1")}
            made.add((await client.get("/nothing", headers=headers)).headers["x-request-id"])
        assert len(made) == 5
        assert all(re.fullmatch("[0-9a-f]{16,32}", identity) for identity in made)


@pytest.mark.anyio
async def test_one_access_line_for_each_request(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fullrank.access")
    started = time.monotonic()
    async with start(access_log=True) as (client, _):
        await client.post("/embed", files=as_files(IMAGES))
        await client.post("/embed", files=as_files([b"bad"]))
        await client.get("/secret%0Apath")
    fields = [record.fields for record in caplog.records if record.name == "fullrank.access"]  # type: ignore[attr-defined]
    assert [(it["method"], it["route"], it["code"], it["images"]) for it in fields] == [
        ("POST", "/embed", 200, 3),
        ("POST", "/embed", 422, 1),
        ("GET", "other", 404, 0),
    ]
    assert 0 < sum(it["seconds"] for it in fields) < time.monotonic() - started
    caplog.clear()
    async with start() as (client, _):
        await client.get("/healthz")
    assert not [record for record in caplog.records if record.name == "fullrank.access"]


def test_formats_carry_the_id_the_fields_and_the_exception() -> None:
    try:
        raise ValueError("broken \udcff")
    except ValueError:
        record = logging.LogRecord("a.b", logging.ERROR, __file__, 1, "it %s", ("broke\n",), sys.exc_info())
    record.fields = {"images": 3, "path": Path("x")}
    token = request_id.set("the-id")
    line = JsonFormatter().format(record)
    text = TextFormatter().format(record)
    request_id.reset(token)
    assert "\n" not in line
    parsed = json.loads(line)
    assert {key: parsed[key] for key in ("level", "logger", "message", "request_id", "images", "path")} == {
        "level": "error",
        "logger": "a.b",
        "message": "it broke\n",
        "request_id": "the-id",
        "images": 3,
        "path": "x",
    }
    assert "ValueError: broken" in parsed["exception"]
    assert text.startswith("ERROR:     it broke\n [the-id]\nTraceback")
    assert "request_id" not in json.loads(JsonFormatter().format(record))


@pytest.mark.anyio
async def test_no_origin_is_allowed_unless_listed(start: Start) -> None:
    origin = {"origin": "https://app.example.org"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with start() as (client, _):
        answer = await client.post("/embed", files=as_files(IMAGES), headers=origin)
        assert "access-control-allow-origin" not in answer.headers
        assert (await client.options("/embed", headers=preflight)).status_code == 405
    async with start(cors_origins="https://app.example.org, https://b.example.org") as (client, _):
        answer = await client.post("/embed", files=as_files(IMAGES), headers=origin)
        assert answer.headers["access-control-allow-origin"] == origin["origin"]
        assert "X-Revision" in answer.headers["access-control-expose-headers"]
        refused = await client.post("/embed", files=as_files([b"bad"]), headers=origin)
        assert refused.headers["access-control-allow-origin"] == origin["origin"]
        allowed = await client.options("/embed", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-headers"]) == (200, "authorization")
        other = await client.post("/embed", files=as_files(IMAGES), headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.anyio
async def test_a_page_from_elsewhere_in_a_local_browser_is_not_trusted(start: Start) -> None:
    async with start(cors_origins="*") as (client, _):
        for path in ("/moments", "/admin/encoders"):
            send = client.get if path == "/moments" else client.post
            error_of(await send(path, headers={"origin": "https://evil.example"}), 403, "forbidden")
        assert (await client.get("/moments", headers={"origin": "http://localhost:8000"})).status_code == 200
    async with start(cors_origins="*", api_key="correct horse") as (client, _):
        headers = {"origin": "https://app.example.org", "authorization": "Bearer correct horse"}
        assert (await client.get("/moments", headers=headers)).status_code == 200


def test_a_process_logs_json_and_reads_its_encoder_again(encoders: Path, tmp_path: Path) -> None:
    live, log = tmp_path / "live", tmp_path / "log"
    shutil.copytree(encoders / "alpha", live)

    def replace(it: Replica, data: Callable[[Path], object], awaited: str) -> str:
        """Change the folder, send SIGHUP, wait for a line, and tell who serves then."""

        def embed(**headers: str) -> httpx.Response:
            return httpx.post(it.url + "/embed", files=as_files(IMAGES), headers=headers, timeout=120)

        def said() -> bool:
            assert embed().status_code == 200
            return awaited in log.read_text()

        data(live)
        it.process.send_signal(signal.SIGHUP)
        until(said)
        name: str = embed(**{"x-request-id": "after-" + re.sub("[ @]", "-", awaited)}).json()["model"]
        return name

    def copy(name: str) -> Callable[[Path], object]:
        return lambda folder: shutil.copytree(encoders / name, folder, dirs_exist_ok=True)

    with replica(log, encoder=live, log_format="json", access_log=True) as it:
        assert replace(it, lambda _: None, "is unchanged in") == "alpha"
        assert replace(it, copy("collapsed"), "was not put in service") == "alpha"
        assert replace(it, lambda it: (it / "encoder.safetensors").write_bytes(b"x"), "encoder.safetensors") == "alpha"
        assert replace(it, copy("beta"), "swapped alpha@") == "beta"
        it.process.send_signal(signal.SIGTERM)
        it.process.wait(120)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"uvicorn.error", "fullrank.service", "fullrank.access"} <= {line["logger"] for line in lines}
    (last,) = [line for line in lines if line.get("request_id") == "after-swapped-alpha-"]
    assert last["route"] == "/embed"
