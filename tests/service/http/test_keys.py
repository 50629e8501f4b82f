"""Who may do what: keys with scopes, loopback without them, and pages of other sites never."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn.protocols.http.httptools_impl as implementation
from pydantic import ValidationError

from service.settings import Settings
from tests.support.app import Start, error_of
from tests.support.images import as_json, encoded, pictures
from tests.support.process import running

pytestmark = pytest.mark.anyio
PNG = encoded(pictures(1)[0])
EMBED, OBSERVE, METRICS, ADMIN = "embedding key", "observing key", "metrics' key", "administrator"
KEYS = f"embed={EMBED}, observe={OBSERVE}, metrics={METRICS}, admin={ADMIN}"
ROWS = {"model": "theirs", "rows": [[1.0, 2.0], [3.0, -4.0]]}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def statuses(client: httpx.AsyncClient, key: str | None) -> dict[str, int]:
    """What each route answers to a key; a swap to what is not there is a 404 for who may ask."""
    headers = {} if key is None else bearer(key)
    openai = {"model": "alpha", "input": as_json([PNG])["images"]}
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": openai["input"]}
    answers = {
        "embed": await client.post("/embed", content=PNG, headers=headers),
        "openai": await client.post("/v1/embeddings", json=openai, headers=headers),
        "models": await client.get("/v1/models", headers=headers),
        "infer": await client.post("/v2/models/alpha/infer", json={"inputs": [tensor]}, headers=headers),
        "observe": await client.post("/observe", json=ROWS, headers=headers),
        "moments": await client.get("/moments", headers=headers),
        "metrics": await client.get("/metrics", headers=headers),
        "admin": await client.post("/admin/encoders", json={"name": "nobody", "gate": "off"}, headers=headers),
    }
    return {name: answer.status_code for name, answer in answers.items()}


EMBEDDING = ("embed", "openai", "models", "infer")
OPEN = {"healthz", "readyz", "info", "spectrum", "docs", "v2", "v2/models/alpha"}


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        (EMBED, {"embed", "openai", "models", "infer"}),
        (OBSERVE, {"observe"}),
        (METRICS, {"moments", "metrics"}),
        (ADMIN, {"admin"}),
    ],
)
async def test_a_key_may_do_what_its_scopes_say_and_no_more(start: Start, key: str, allowed: set[str]) -> None:
    async with start(api_keys=KEYS) as (client, _):
        done = {"observe": 202, "admin": 404}
        for name, status in (await statuses(client, key)).items():
            assert status == (done.get(name, 200) if name in allowed else 403), name
        for path in OPEN:
            assert (await client.get(f"/{path}")).status_code == 200
        assert set((await statuses(client, None)).values()) == {401}
        assert set((await statuses(client, "no such key")).values()) == {401}


async def test_the_one_key_does_what_no_other_is_there_for(start: Start) -> None:
    async with start(api_key="correct horse") as (client, _):
        alone = await statuses(client, "correct horse")
        assert alone == dict.fromkeys(EMBEDDING, 200) | {"observe": 202, "moments": 200, "metrics": 200, "admin": 404}
        assert (await statuses(client, None))["metrics"] == 200  # open as before, unless a key is there for it
    async with start(api_key="correct horse", api_keys=f"admin={ADMIN}") as (client, _):
        beside = await statuses(client, "correct horse")
        assert beside == alone | {"admin": 403}
        refused = await client.post(
            "/admin/encoders", json={"name": "collapsed", "gate": "off"}, headers=bearer("correct horse")
        )
        assert "admin" in error_of(refused, 403, "forbidden")["message"]
        served = await client.post("/admin/encoders", json={"name": "collapsed", "gate": "off"}, headers=bearer(ADMIN))
        assert served.json()["served"]["model"] == "collapsed"


def test_keys_come_from_files_and_folders(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    def scopes(**given: Any) -> dict[bytes, set[str]]:
        return {it.key: set(it.scopes) for it in settings(**given).grants}

    every = {"embed", "observe", "metrics", "admin"}
    (file := tmp_path / "keys").write_text("# a comment\n\nfirst key\nembed+observe=second key\nc2VjcmV0IQ==\n")
    rest = every - {"observe"}
    assert scopes(api_keys_file=file) == {
        b"first key": rest,
        b"second key": {"embed", "observe"},
        b"c2VjcmV0IQ==": rest,
    }
    (folder := tmp_path / "secret").mkdir()
    (folder / "..data").mkdir()
    for name, key in (("embed-observe", "first key\n"), ("admin-1", "second key\r\n"), ("admin-2", "third key")):
        (folder / name).write_text(key)
    found = scopes(api_keys_file=folder, api_key="fourth key\n")
    assert found == {
        b"first key": {"embed", "observe"},
        b"second key": {"admin"},
        b"third key": {"admin"},
        b"fourth key": {"embed", "metrics"},
    }


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FULLRANK_API_KEYZ": "correct horse"}, "did you mean FULLRANK_API_KEY"),
        ({"FULLRANK_MAX_BATCHES": "8"}, "did you mean FULLRANK_MAX_BATCH?"),
        ({"fullrank_api_keyz": "correct horse"}, "did you mean FULLRANK_API_KEY"),
        ({"FULLRANK_XYZZY": "8"}, "FULLRANK_XYZZY is no setting"),
        ({"FULLRANK_API_KEYS": "correct horse"}, "write SCOPE=KEY"),
        ({"FULLRANK_API_KEYS": "emded=correct horse"}, "the scopes are embed, observe, metrics, admin"),
        ({"FULLRANK_API_KEYS": "embed=short"}, "shorter than 8"),
        ({"FULLRANK_API_KEY": "schlüssel für alle"}, "printable ASCII"),
        ({"FULLRANK_API_KEY": "two\nlines of it"}, "printable ASCII"),
        ({"FULLRANK_API_KEYS_FILE": "/nowhere/at/all"}, "cannot be read"),
        ({"FULLRANK_ALIASES": "default"}, "write NAME=ENCODER"),
    ],
)
def test_what_cannot_be_meant_stops_the_start_and_shows_no_key(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        Settings()
    assert words in str(error.value)
    assert "horse" not in str(error.value)


def test_files_of_keys_that_say_nothing_stop_the_start(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    (file := tmp_path / "keys").write_text("\n# none yet\n")
    (folder := tmp_path / "folder").mkdir()
    for path in (file, folder):
        with pytest.raises(ValidationError, match="holds no key"):
            settings(api_keys_file=path)
    (folder / "embde").write_text("correct horse")
    with pytest.raises(ValidationError, match="named for no scope") as error:
        settings(api_keys_file=folder)
    assert "horse" not in str(error.value)
    file.write_text("embde=correct horse")
    with pytest.raises(ValidationError, match="write SCOPE=KEY"):
        settings(api_keys_file=file)


def test_what_kubernetes_sets_beside_a_service_of_this_name_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "FULLRANK_SERVICE_HOST": "10.0.0.1",
        "FULLRANK_SERVICE_PORT_HTTP": "8000",
        "FULLRANK_PORT": "tcp://10.0.0.1:8000",
        "FULLRANK_PORT_8000_TCP_ADDR": "10.0.0.1",
        "FULLRANK_GPU_PORT": "tcp://10.0.0.2:8000",
    }.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000


async def test_a_page_of_another_site_may_not_embed_without_a_key(start: Start) -> None:
    async def embed(client: httpx.AsyncClient, **headers: str) -> int:
        return (await client.post("/embed", content=PNG, headers=headers)).status_code

    async with start(cors_origins="https://app.example.org") as (client, _):
        assert await embed(client) == 200  # curl and other programs send no Origin
        assert await embed(client, host="embeddings.example.org") == 200
        for host, origin in (
            ("localhost", "http://localhost"),
            ("127.0.0.1:8000", "http://localhost:3000"),  # a page of this machine, as for admin
            ("[::1]:8000", "http://[::1]:8000"),
            ("10.0.0.7:8000", "http://10.0.0.7:8000"),  # its own page, by an address
            ("anything", "https://app.example.org"),
        ):
            assert await embed(client, host=host, origin=origin) == 200, (host, origin)
        for host, origin in (
            ("127.0.0.1:8000", "http://evil.example"),
            ("localhost", "null"),
            ("evil.example:8000", "http://evil.example:8000"),  # its name was made to point here
            ("10.0.0.7:8000", "http://10.0.0.7"),
            ("10.0.0.7:8000", "http://10.0.0.8:8000"),
            ("localhost", "http://[::1"),
            ("[::1", "http://localhost"),
            ("", "http://"),
        ):
            answer = await client.post("/embed", content=PNG, headers={"host": host, "origin": origin})
            assert error_of(answer, 403, "forbidden")["field"] == "Origin", (host, origin)
        body = {"model": "alpha", "input": as_json([PNG])["images"]}
        assert (await client.post("/v1/embeddings", json=body)).status_code == 200
        evil = {"origin": "http://evil.example"}
        assert (await client.post("/v1/embeddings", json=body, headers=evil)).status_code == 403
        assert (await client.post("/v2/models/alpha/infer", json={}, headers=evil)).status_code == 403
    async with start(api_key="correct horse") as (client, _):  # no page knows the key by itself
        assert await embed(client, origin="http://evil.example", **bearer("correct horse")) == 200


def test_a_stranger_is_not_on_loopback_whatever_a_proxy_may_say(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with running(settings(host="0.0.0.0")) as (url, server):
        assert httpx.get(url + "/moments").status_code == 200
        for headers in (
            {"x-forwarded-for": "203.0.113.9"},
            {"x-forwarded-for": "127.0.0.1, 203.0.113.9"},
            {"x-forwarded-for": "203.0.113.9, 127.0.0.1"},
            {"x-real-ip": "203.0.113.9"},
            {"forwarded": "for=203.0.113.9"},
        ):
            error_of(httpx.get(url + "/moments", headers=headers), 403, "forbidden")
        assert httpx.get(url + "/moments", headers={"x-forwarded-for": "127.0.0.1"}).status_code == 200
        monkeypatch.setattr(implementation, "get_remote_addr", lambda _: ("203.0.113.9", 4321))
        with httpx.Client(base_url=url) as client:  # now everybody comes from elsewhere, and says otherwise
            claim = {"x-forwarded-for": "127.0.0.1", "host": "localhost"}
            error_of(client.get("/moments", headers=claim), 403, "forbidden")
            error_of(client.post("/admin/encoders", json={"name": "beta"}, headers=claim), 403, "forbidden")
        assert server.service.current.name == "alpha"
