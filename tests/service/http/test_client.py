"""fullrank.client, sync and async, against a real uvicorn."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from cli import app as cli
from fullrank.client import AsyncClient, Client, EmbeddingError
from models import artifact
from models.embedder import Embedder, normalize
from service.http.app import Server
from service.settings import Settings
from tests.support.app import held
from tests.support.images import encoded, pictures
from tests.support.process import running
from tools.stack import free_port

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server(settings: Callable[..., Settings]) -> Iterator[tuple[str, Server]]:
    limits = {"max_images_per_request": 8, "max_pending_images": 8, "max_body_bytes": 65536}
    with running(settings(**limits)) as both:
        yield both


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{i}.png" for i in range(30)]
    for file, picture in zip(files, pictures(30, seed=40), strict=True):
        file.write_bytes(encoded(picture))
    return files


@pytest.fixture(scope="module")
def expected(settings: Callable[..., Settings], paths: list[Path]) -> np.ndarray:
    return Embedder(artifact.load(settings().encoder)).embed_files(paths).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    import torch

    return normalize(torch.from_numpy(rows)).numpy()


def in_both_ways(url: str, images: Any, normalize: bool = True, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows by Client and by AsyncClient."""

    async def asynchronously() -> np.ndarray:
        async with AsyncClient(url, **options) as client:
            return await client.embed(images, normalize=normalize)

    with Client(url, **options) as client:
        return client.embed(images, normalize=normalize), asyncio.run(asynchronously())


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_rows_come_in_order_whatever_the_batches(
    server: tuple[str, Server], paths: list[Path], expected: np.ndarray, batch: int
) -> None:
    # 100 exceeds max_images_per_request, and several requests of 8 exceed max_pending_images: split, and sent again.
    mixed = [path.read_bytes() if i % 3 else str(path) if i % 2 else path for i, path in enumerate(paths)]
    for rows in in_both_ways(server[0], mixed, batch=batch, longest_wait=0.05, retries=10_000):
        np.testing.assert_allclose(rows, unit(expected), atol=2e-6)


def test_one_none_and_raw(server: tuple[str, Server], paths: list[Path], expected: np.ndarray) -> None:
    for rows in in_both_ways(server[0], str(paths[0]), normalize=False):
        np.testing.assert_allclose(rows, expected[:1], rtol=1e-4, atol=1e-6)
    for rows in in_both_ways(server[0], []):
        assert rows.shape == (0, 0)
    with Client(server[0]) as client:
        client.embed(paths[0])
        assert client.model == "alpha"
        assert client.revision == client.info()["encoder"]["revision"]
        assert client.embed(paths[0], model=f"alpha@{client.revision}").shape == (1, 32)
        with pytest.raises(EmbeddingError, match="no encoder 'beta' is in service"):
            client.embed(paths[0], model="beta")


def test_a_bad_image_is_named(server: tuple[str, Server], paths: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"hello")
    with Client(server[0], batch=4) as client:
        with pytest.raises(EmbeddingError, match=r"bad\.png: the bytes are no image") as caught:
            client.embed([*paths[:6], bad, *paths[6:]])
        assert (caught.value.image, caught.value.status, caught.value.code) == (6, 422, "not_an_image")
        with pytest.raises(EmbeddingError, match="image 5: the image is empty"):
            client.embed([path.read_bytes() for path in paths[:5]] + [b""])
        with pytest.raises(EmbeddingError, match="65536 bytes, the limit"):
            client.embed([b"x" * 70_000])
        with pytest.raises(FileNotFoundError, match="nowhere"):
            client.embed([tmp_path / "nowhere.png"])


class SleptError(Exception):
    """With the seconds."""


def test_it_waits_as_long_as_a_full_service_asks(
    server: tuple[str, Server], paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise SleptError(seconds)

    url, running_server = server
    image = paths[0].read_bytes()
    with Client(url, retries=0) as impatient, Client(url) as patient, Client(url, longest_wait=0.1) as capped:
        with held(running_server.service.current) as hold:
            filling = threading.Thread(target=patient.embed, args=([image] * 8,))
            filling.start()
            assert hold.entered.wait(120)
            with pytest.raises(EmbeddingError, match="8 images are pending") as caught:
                impatient.embed(image)
            assert caught.value.status == 429
            asked = int(httpx.post(url + "/embed", content=image).headers["Retry-After"])
            monkeypatch.setattr("fullrank.client.time", SimpleNamespace(sleep=sleep))
            with pytest.raises(SleptError) as slept:
                patient.embed(image)
            assert slept.value.args[0] >= asked >= 1
            with pytest.raises(SleptError) as slept:
                capped.embed(image)
            assert 0.1 <= slept.value.args[0] <= 0.125
        filling.join()
        assert capped.embed(image).shape == (1, 32)


def test_failures_are_said_in_words() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(EmbeddingError, match="is the service"):
        client.embed(b"x")

    class Proxy(BaseHTTPRequestHandler):
        status = 502

        def do_POST(self) -> None:
            self.send_response(self.status)
            self.end_headers()
            self.wfile.write(b"<html>bad gateway</html>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{proxy.server_port}"
            with Client(url) as client, pytest.raises(EmbeddingError, match="answered 502: <html>bad gateway"):
                client.embed(b"x")
            Proxy.status = 200
            with Client(url) as client, pytest.raises(EmbeddingError, match="answered 200, and no embeddings"):
                client.embed(b"x")
        finally:
            proxy.shutdown()
    with pytest.raises(ValueError, match="at least 1"):
        Client(batch=0)
    with pytest.raises(ValueError, match="url: 'http://a:80b' is no address: Invalid port: '80b'"):
        Client("http://a:80b")


def test_rows_of_two_encoders_are_never_mixed(settings: Callable[..., Settings], paths: list[Path]) -> None:
    with running(settings(max_batch=1)) as (url, it), Client(url, batch=1, concurrency=1) as client:
        embed, swapped = client._converse, threading.Event()

        def swap_before_the_second(talk: Any) -> Any:
            part = embed(talk)
            if not swapped.is_set():
                swapped.set()
                asyncio.run_coroutine_threadsafe(it.service.swap("beta", "off"), it.service.loop).result(120)
            return part

        client._converse = swap_before_the_second  # type: ignore[method-assign]
        with pytest.raises(EmbeddingError, match=r"alpha@.* and beta@.* do not compare"):
            client.embed(paths[:3])


def test_a_key_is_sent(settings: Callable[..., Settings], paths: list[Path], tmp_path: Path) -> None:
    with running(settings(api_key="correct horse")) as (url, _):
        with Client(url) as client, pytest.raises(EmbeddingError, match="needs the service's key"):
            client.embed(paths)
        with Client(url, key="correct horse") as client:
            assert client.embed(paths).shape == (30, 32)
        out = tmp_path / "rows.npy"
        files = [str(path) for path in paths]
        done = CliRunner().invoke(cli, ["embed", *files, "--url", url, "--key", "correct horse", "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert np.load(out).shape == (30, 32)
        refused = CliRunner().invoke(cli, ["embed", *files, "--url", url])
        assert refused.exit_code == 1
        assert "needs the service's key" in refused.stderr


def test_the_command_prints_and_names_the_bad_file(
    server: tuple[str, Server], paths: list[Path], expected: np.ndarray, tmp_path: Path
) -> None:
    import json

    done = CliRunner().invoke(cli, ["embed", str(paths[0]), str(paths[1]), "--url", server[0]])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(paths[0]), str(paths[1])]
    np.testing.assert_allclose([line["embedding"] for line in lines], unit(expected)[:2], atol=2e-6)
    (tmp_path / "bad.png").write_bytes(b"x")
    bad = CliRunner().invoke(cli, ["embed", str(tmp_path / "bad.png"), "--url", server[0]])
    assert bad.exit_code == 1
    assert "bad.png" in bad.stderr
    both = CliRunner().invoke(cli, ["embed", str(paths[0])])
    assert both.exit_code == 2
    assert "--encoder or --url" in both.stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import fullrank.client, sys; print([m for m in ('torch', 'fastapi', 'models') if m in sys.modules])", "[]"),
        ("import sys; sys.modules['httpx'] = None; import fullrank.client", "pip install 'fullrank[client]'"),
    ],
)
def test_it_is_light_and_says_what_it_needs(program: str, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert words in done.stdout + done.stderr
