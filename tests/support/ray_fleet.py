"""What tests ask of a fleet that Ray Serve runs, through its proxy."""

import concurrent.futures
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.support.images import as_files, encoded
from tests.support.ray_cluster import PATIENCE, ROOT, environment, wait_for


def answers_while(fleet: str, ray_cluster: tuple[str, Path], program: str, done: Callable[[], bool]) -> int:
    """Keep every replica busy, run a program that stops some, and see each request answered. Returns the images."""
    address, folder = ray_cluster
    script = f"import ray; ray.init({address!r}); from ray import serve; serve.status(); print('ready'); input(); "
    command = [sys.executable, "-c", script.replace("; ", "\n") + program]
    slow = slow_images()[:16]
    asked: list[concurrent.futures.Future[httpx.Response]] = []
    with (
        subprocess.Popen(
            command, cwd=ROOT, env=environment(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as operator,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        assert operator.stdin is not None
        assert operator.stdout is not None
        assert any("ready" in line for line in operator.stdout), "the operator's program ended"

        def all_are_busy() -> bool:
            if len(asked) < 16:
                asked.append(pool.submit(httpx.post, fleet + "/embed", files=as_files(slow), timeout=PATIENCE))
            return all(pending(fleet).values())

        wait_for(all_are_busy)
        operator.stdin.write("\n")
        operator.stdin.flush()
        wait_for(done)
        assert [it.result().status_code for it in asked] == [200] * len(asked)
        operator.communicate(timeout=PATIENCE)
    return len(asked) * len(slow)


def pending(url: str) -> dict[str, float]:
    """Images that each replica has admitted and not answered."""
    found = re.findall(r'^fullrank_pending_images{instance="(.*)"} (.*)$', get(url, "/metrics").text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


def wait_for_reports(url: str) -> None:
    """Until every replica has told the collector what it has answered so far."""
    asked = time.monotonic()
    # A second, because a report is made before it is sent.
    wait_for(lambda: all(it["seconds_ago"] < time.monotonic() - asked - 1 for it in spectrum(url)["replicas"]))


def states(url: str) -> dict[str, str]:
    """Each replica's verdict."""
    return {it["instance"]: it["verdict"]["state"] for it in spectrum(url)["replicas"]}


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=30).status_code == 200
    return False


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, timeout=PATIENCE)


def post(url: str, images: Any) -> httpx.Response:
    """Embed, and send the request again as a client has to where a replica died: each is answered in the end."""
    for _ in range(20):
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(url + "/embed", files=as_files([encoded(it) for it in images]), timeout=PATIENCE)
            if answer.status_code == 200:
                return answer
        time.sleep(0.5)
    raise AssertionError("a request was never answered")


def admin(url: str, name: str) -> httpx.Response:
    return httpx.post(url + "/admin/encoders", json={"name": name}, timeout=PATIENCE)


def spectrum(url: str) -> dict[str, Any]:
    answer = get(url, "/spectrum?fleet=1")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def total(url: str, name: str) -> float:
    """A series without labels of the fleet's scrape."""
    answer = get(url, "/metrics")
    assert answer.status_code == 200, answer.text
    return sample(answer.text, name)


def sample(scrape: str, name: str) -> float:
    """The same, of a scrape at hand."""
    return next(float(line.split()[1]) for line in scrape.splitlines() if line.startswith(name + " "))


def slow_images() -> list[bytes]:
    """Files that are small and take long to decode."""
    return [encoded(Image.new("L", (3900, 3900), shade)) for shade in range(8)] * 4
