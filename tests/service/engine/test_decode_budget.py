"""Files of a few bytes that used to stop the service: an honest client is answered while they come, over a real socket.

"Answered" means with 200 before the service's own deadline, by the same process.
"""

import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable

import httpx
import pytest

from service.http.app import Server
from service.settings import Settings
from tests.support.attacks import RLE_BITMAP, repeated_scans, webp
from tests.support.images import as_files, as_json, encoded, noise, pictures
from tests.support.process import running, until

HONEST = [encoded(picture) for picture in pictures(2)]
SCANS = repeated_scans(7000, 7000, 60)
# As large as the limits let them be: seconds of work where the limits were the encoder's need alone.
WEBP, JPEG = webp(4000, 4000), repeated_scans(5000, 5000, 16)


def ask_and_leave(url: str, images: list[bytes]) -> None:
    """Send a whole request, and go before its answer."""
    body = json.dumps(as_json(images)).encode()
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as it:
        it.sendall(head % len(body) + body)


def refused(url: str, image: bytes) -> str:
    response = httpx.post(url + "/embed", json=as_json([image]), timeout=120)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["field"] == "images[0]"
    code: str = error["code"]
    return code


def no_decoder_works(server: Server) -> bool:
    return not server.service.engine._decoder._pool._tasks


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (RLE_BITMAP, "rle_bitmap"),
        (webp(7071, 7071), "image_too_large"),
        (SCANS, "too_many_scans"),
    ],
    ids=["bmp", "webp", "jpeg"],
)
def test_what_used_to_stop_the_service_is_refused_by_name(
    settings: Callable[..., Settings], attack: bytes, code: str
) -> None:
    with running(settings()) as (url, _):
        assert refused(url, attack) == code
        for _ in range(2):
            ask_and_leave(url, [attack] * 8)
        assert httpx.post(url + "/embed", files=as_files(HONEST), timeout=120).status_code == 200


@pytest.mark.parametrize("attack", [WEBP, JPEG], ids=["webp", "jpeg"])
def test_the_worst_that_is_let_in_holds_up_nobody_else(settings: Callable[..., Settings], attack: bytes) -> None:
    with running(settings()) as (url, server):
        for _ in range(4):
            ask_and_leave(url, [attack] * 12)
        for _ in range(3):
            assert httpx.post(url + "/embed", files=as_files(HONEST), timeout=120).status_code == 200
        # What its clients left is not worked off.
        until(lambda: server.service.admission.pending == 0)
        until(lambda: no_decoder_works(server))


def test_a_large_honest_photo_is_answered_while_they_come(settings: Callable[..., Settings]) -> None:
    photo = encoded(noise((400, 300)).resize((4000, 3000)), "JPEG")  # 12 megapixels
    with running(settings(request_timeout=600)) as (url, _):
        others = threading.Thread(target=lambda: httpx.post(url + "/embed", json=as_json([WEBP] * 3), timeout=600))
        others.start()
        answer = httpx.post(url + "/embed", json=as_json([photo, HONEST[0]]), timeout=600)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["embeddings"]) == 2
        others.join(600)


def test_sigterm_ends_it_while_decoding(settings: Callable[..., Settings]) -> None:
    with running(settings(request_timeout=2)) as (url, server):
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url + "/embed", json=as_json([WEBP] * 60), timeout=0.5)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.phase == "stopped")
        until(lambda: not any(process.running for process in server.service.engine._decoder._pool._processes.values()))
