"""GET /history, GET /events and POST /neighbours, and the files of the page: what they say, refuse and hold."""

import asyncio
import base64
import hashlib
import io
import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.http.routes import page as routes
from service.settings import Settings
from service.watching import listeners
from tests.support.app import Start, error_of
from tests.support.images import DIMENSION, as_files, encoded, pictures
from tests.support.process import get, running, until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]


async def pointed(client: httpx.AsyncClient, **params: Any) -> dict[str, Any]:
    """The document, once it has a point."""
    async with asyncio.timeout(120):
        while True:
            body: dict[str, Any] = (await client.get("/history", params=params)).json()
            if body["history"] and body["history"]["time"]:
                return body
            await asyncio.sleep(0.01)


async def test_it_names_every_model_and_tells_one_of_them(start: Start) -> None:
    async with start(encoders="beta", windows="20,60") as (client, service):
        rows = np.random.default_rng(0).normal(size=(40, 16)).tolist()
        assert (await client.post("/observe", json={"model": "theirs", "rows": rows})).status_code == 202
        body = await pointed(client)
        assert [(it["model"], it["observed"], it["watched"]) for it in body["encoders"]] == [
            ("alpha", False, True),
            ("beta", False, True),
            ("theirs", True, True),
        ]
        assert (body["model"], body["default"], body["phase"], body["fault"]) == ("alpha", True, "ready", None)
        assert body["traffic"]["limit"] == service.settings.max_pending_images
        assert body["until"] == body["history"]["time"][-1]
        later = (await client.get("/history", params={"since": body["until"] + 60})).json()
        assert later["history"]["time"] == later["traffic"]["time"] == []
        theirs = await pointed(client, model="theirs")
        assert (theirs["model"], theirs["observed"], theirs["default"]) == ("theirs", True, False)
        spectrum = theirs["history"]["spectrum"][0]
        assert len(spectrum) == len(theirs["history"]["ranks"])
        error_of(await client.get("/history", params={"model": "<b>x</b>"}), 404, "no_such_model")
        for since in ("nan", "inf", "soon"):
            assert (await client.get("/history", params={"since": since})).status_code == 422


async def test_the_first_image_is_seen_before_it_is_counted(start: Start) -> None:
    """Else the page says "0 rows" for half a minute to a newcomer who has just sent one."""
    async with start(windows="3600") as (client, _):
        assert (await client.post("/embed", content=encoded(pictures(1)[0]))).status_code == 200
        async with asyncio.timeout(120):
            while "not counted yet" not in (said := (await client.get("/history")).json()["encoders"][0])["reason"]:
                await asyncio.sleep(0.01)
        assert said["rows"] == 0
        for reason in (said["reason"], (await client.get("/spectrum")).json()["verdict"]["reason"]):
            assert reason.startswith("the window holds 0 rows; ")
            assert reason.endswith("; 1 row observed is not counted yet: a block closes when it is full or after 360 s")


async def test_without_a_monitor_it_says_so(start: Start) -> None:
    async with start(monitor=False) as (client, _):
        body = (await client.get("/history")).json()
        (entry,) = body["encoders"]
        assert (entry["watched"], entry["state"], entry["reason"]) == (False, None, "the monitor is off")
        assert body["history"] is None


async def test_a_swap_is_in_the_history_of_the_encoder_that_came(start: Start) -> None:
    async with start(windows="20,60") as (client, _):
        await pointed(client)
        assert (await client.post("/admin/encoders", json={"name": "beta"})).status_code == 200
        async with asyncio.timeout(120):
            while not (events := (await client.get("/history")).json()["history"] or {}).get("events"):
                await asyncio.sleep(0.05)
        swaps = [it for it in events["events"] if it["kind"] == "swap"]
        assert [(it["from"].split("@")[0], it["to"].split("@")[0]) for it in swaps] == [("alpha", "beta")]


def test_a_restart_keeps_the_history(settings: Callable[..., Settings], tmp_path: Path) -> None:
    kept = settings(windows="20,60", state_dir=tmp_path)
    with running(kept) as (url, _):
        rows = np.random.default_rng(0).normal(size=(40, 16)).tolist()
        assert httpx.post(f"{url}/observe", json={"model": "theirs", "rows": rows}).status_code == 202
        until(lambda: bool((get(f"{url}/history", model="theirs").json()["history"] or {}).get("time")))
        first = get(f"{url}/history").json()["history"]["time"][0]
    with running(kept) as (url, _):
        body = get(f"{url}/history").json()
        assert body["history"]["time"][0] == first
        gone = next(it for it in body["encoders"] if it["model"] == "theirs")
        assert (gone["gone"], gone["watched"], gone["state"]) == (True, False, None)
        assert get(f"{url}/history", model="theirs").json()["history"]["time"]


def messages(response: httpx.Response, count: int) -> list[tuple[str, Any]]:
    """So many messages of a stream, parsed as a browser does."""
    found: list[tuple[str, Any]] = []
    event = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((event, json.loads(line.removeprefix("data: "))))
            if len(found) == count:
                break
    return found


@pytest.fixture(scope="module")
def url(settings: Callable[..., Settings]) -> Any:
    with running(settings(windows="20,60")) as (address, _):
        yield address


async def test_events_come_as_the_history_and_the_spectrum(url: str) -> None:
    with httpx.Client(timeout=120) as client, client.stream("GET", f"{url}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        found = messages(response, 4)
    assert found[0][0] == "update"
    assert found[0][1].keys() == get(f"{url}/history").json().keys()
    spectra = [value for event, value in found if event == "spectrum"]
    assert spectra[0].keys() == get(f"{url}/spectrum").json().keys()
    times = [it for event, value in found if event == "update" for it in value["history"]["time"]]
    assert times == sorted(set(times))  # each point once
    assert get(f"{url}/events", model="nobody").status_code == 404
    assert httpx.head(f"{url}/events", timeout=120).status_code == 200  # and ends


async def test_a_stream_about_an_encoder_that_was_replaced_ends_and_asking_again_says_why(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.http.routes.history.PERIOD", 0.05)
    with running(settings(encoders="beta", windows="20,60")) as (url, it), httpx.Client(timeout=120) as client:
        with client.stream("GET", f"{url}/events", params={"model": "beta"}) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("retry: ")
            swap = it.service.swap("collapsed", "off", "beta")
            asyncio.run_coroutine_threadsafe(swap, it.service.loop).result(120)
            rest = list(lines)  # ends, once its history is the other's; a part of an answer would raise
        assert any(line.startswith("event: update") for line in rest)
        assert get(f"{url}/events", model="beta").status_code == 404
    assert not [record for record in caplog.records if record.exc_info]


async def test_the_number_of_listeners_is_bounded(settings: Callable[..., Settings]) -> None:
    with running(settings()) as (url, server), httpx.Client(timeout=120) as client:
        server.service.listeners.limit = 2
        with client.stream("GET", f"{url}/events"), client.stream("GET", f"{url}/events"):
            until(lambda: server.service.listeners.count == 2)
            # As a stream, which ends here even if it is let in.
            with client.stream("GET", f"{url}/events") as refused:
                assert refused.status_code == 429
                refused.read()
            error_of(refused, 429, "too_many_listeners")
            assert refused.headers["retry-after"]
        until(lambda: server.service.listeners.count == 0)  # they left
        with client.stream("GET", f"{url}/events") as again:
            assert messages(again, 1)
    assert listeners.LIMIT == 32


async def test_a_stream_ends_with_the_service(settings: Callable[..., Settings]) -> None:
    with running(settings(request_timeout=600)) as (url, server), httpx.Client(timeout=120) as client:
        with client.stream("GET", f"{url}/events") as response:
            lines = response.iter_lines()
            assert next(lines).startswith("retry: ")
            server.should_exit = True
            rest = list(lines)  # ends: else this would wait for ever
        assert any(line.startswith("event: update") for line in rest)
        assert server.service.listeners.ended


def test_one_who_does_not_read_is_dropped(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued for him: what the sockets do not take is not made, and the connection is closed."""
    from service.http.routes import history

    honest = history.update
    monkeypatch.setattr(history, "update", lambda *given: honest(*given) | {"long": "x" * 2**22})  # fills the sockets
    monkeypatch.setattr(history, "PERIOD", 0.001)
    monkeypatch.setattr("service.http.limits.GRACE", 0.2)
    with running(settings(request_timeout=1)) as (url, server):
        host, port = url.removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.service.listeners.count == 1)
        until(lambda: server.service.listeners.count == 0)
        slow.close()


async def test_the_nearest_canary_images_are_the_nearest(start: Start) -> None:
    async with start() as (client, service):
        image = encoded(pictures(1, 5)[0])
        embedded = (await client.post("/embed", files=as_files([image]))).json()
        body = {"embedding": embedded["embeddings"][0], "count": 5}
        answer = await client.post("/neighbours", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        canary = service.current.artifact.canary
        assert canary is not None
        row = np.array(body["embedding"]) / np.linalg.norm(body["embedding"])
        stored = canary.embeddings.double().numpy()
        cosines = stored @ row / np.linalg.norm(stored, axis=1)
        assert [it["index"] for it in found["neighbours"]] == np.argsort(-cosines)[:5].tolist()
        assert [it["cosine"] for it in found["neighbours"]] == pytest.approx(sorted(cosines)[::-1][:5], abs=1e-6)
        assert (found["model"], found["canary"]) == ("alpha", len(canary.images))
        # A canary image's own embedding is nearest to itself, and its picture comes back.
        own = (await client.post("/neighbours", json={"embedding": stored[7].tolist(), "count": 1})).json()
        assert own["neighbours"][0]["index"] == 7
        picture = own["neighbours"][0]["image"]
        assert picture.startswith("data:image/png;base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(shown), canary.images[7, 0].numpy())


BAD: dict[str, tuple[Any, int, str]] = {
    "no embedding": ({}, 422, "embedding"),
    "text": ({"embedding": "x"}, 422, "embedding"),
    "another width": ({"embedding": [1.0]}, 422, "embedding"),
    "all zero": ({"embedding": [0.0] * DIMENSION}, 422, "embedding"),
    "infinite": ({"embedding": [1e308] * DIMENSION}, 422, "embedding"),
    "a word inside": ({"embedding": ["a"] + [1.0] * (DIMENSION - 1)}, 422, "embedding"),
    "true inside": ({"embedding": [True] + [1.0] * (DIMENSION - 1)}, 422, "embedding"),
    "count of none": ({"embedding": [1.0] * DIMENSION, "count": 0}, 422, "count"),
    "count beyond": ({"embedding": [1.0] * DIMENSION, "count": 33}, 422, "count"),
    "count true": ({"embedding": [1.0] * DIMENSION, "count": True}, 422, "count"),
    "unknown field": ({"embedding": [1.0] * DIMENSION, "k": 1}, 422, "k"),
    "unknown model": ({"embedding": [1.0] * DIMENSION, "model": "nobody"}, 404, "model"),
    "model of another type": ({"embedding": [1.0] * DIMENSION, "model": 1}, 422, "model"),
    "a list": ([1.0], 422, "body"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_embedding_is_refused_by_name(shared: Any, case: str) -> None:
    body, status, field = BAD[case]
    client, _ = shared
    answer = await client.post("/neighbours", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["field"] == field


async def test_canary_images_need_the_key_that_reveals(start: Start) -> None:
    body = {"embedding": [1.0] * DIMENSION}
    async with start(api_keys="embed=embed-key-1,metrics=metrics-key-1", api_key="master-key-1") as (client, _):
        for key, status in (("", 401), ("wrong-key-1", 401), ("embed-key-1", 403), ("metrics-key-1", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert (await client.post("/neighbours", json=body, headers=headers)).status_code == status, key
        for path in ("/history", "/"):  # as /spectrum, which needs none
            assert (await client.get(path)).status_code == 200
    async with start(address="10.1.2.3") as (client, _):
        error_of(await client.post("/neighbours", json=body), 403, "forbidden")
        assert (await client.get("/history")).status_code == 200


async def test_the_page_loads_from_this_server_only_and_nothing_inline(shared: Any) -> None:
    client, _ = shared
    html = await client.get("/")
    policy = html.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= set(policy.split("; "))
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=|javascript:", html.text)
    wanted = set(re.findall(r'(?:href|src)="(page/[^"]+)"', html.text))
    assert "page/main.js" in wanted
    seen: set[str] = set()
    while missing := wanted - seen:
        for path in missing:
            answer = await client.get(f"/{path}")
            assert answer.status_code == 200, path
            assert answer.headers["content-security-policy"] == policy
            for module in re.findall(r'(?:from|import) "\./([^"]+)"', answer.text):
                wanted.add(str((Path("/") / Path(path).parent / module).resolve()).lstrip("/"))
            if "vendor" not in path:
                assert not re.search(
                    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|https?://(?!www\.w3\.org)", answer.text
                )
            seen.add(path)
    assert {f"page/{name}" for name in routes.ASSETS if name.endswith((".js", ".css"))} == {
        it for it in seen if it.endswith((".js", ".css"))
    }
    for path in ("page/../operations.py", "page/index.html", "page/none.js", "page/%2e%2e/app.py", "runbooks/none"):
        assert (await client.get(f"/{path}")).status_code == 404, path


async def test_every_runbook_the_page_names_is_served(shared: Any) -> None:
    client, _ = shared
    named = {
        name
        for path in routes.ASSETS.values()
        if path.suffix == ".js"
        for name in re.findall(r'"(Embedding[A-Z]\w+)"', path.read_text())
    }
    assert len(named) > 8
    for name in named:
        answer = await client.get(f"/runbooks/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.text == (ROOT / "docs" / "runbooks" / f"{name}.md").read_text()


async def test_metrics_and_operations_the_page_names_exist(shared: Any) -> None:
    client, _ = shared
    tiles = routes.ASSETS["tiles.js"].read_text()
    exposed = (await client.get("/metrics")).text
    for metric in set(re.findall(r'metric: "(\w+)"', tiles)):
        assert f"# HELP {metric}" in exposed, metric
    paths = (await client.get("/openapi.json")).json()["paths"]
    operations = {f"{it['tags'][0]}/{it['operationId']}" for path in paths.values() for it in path.values()}
    assert set(re.findall(r'api: "([^"]+)"', tiles)) <= operations


def test_vendored_files_are_what_their_note_says() -> None:
    note = routes.ASSETS["vendor/README.txt"].read_text()
    for name in ("uPlot-1.6.32.js", "uPlot-1.6.32.css"):
        digest = hashlib.sha256(routes.ASSETS[f"vendor/{name}"].read_bytes()).hexdigest()
        assert re.search(rf"{re.escape(name)}.*\n\s+sha256 {digest}", note)
    assert "MIT" in routes.ASSETS["vendor/uPlot.LICENSE.txt"].read_text()


async def test_two_hundred_models_are_one_answer(start: Start) -> None:
    async with start() as (client, service):
        watched = service.monitors()
        monitor = watched[0][2]
        service.history.record([*watched, *((f"m{i}", "observed", monitor) for i in range(300))], {}, time.time())
        assert len(service.history.models()) == 256
        body = (await client.get("/history")).json()
        assert len(body["encoders"]) == 256
        assert body["model"] == "alpha"
        theirs = (await client.get("/history", params={"model": "m200"})).json()
        assert (theirs["model"], len(theirs["history"]["time"])) == ("m200", 1)
