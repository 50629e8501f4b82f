"""A real uvicorn on loopback: on a thread of this process, or in a process of its own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.http.app import Server, build_server
from service.settings import Settings
from tools.stack import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "from service.http.app import Server, build_server, serve; from service.settings import Settings; serve(Settings())"
)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come, however loaded the machine: it only has to end."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(url: str, **params: str) -> httpx.Response:
    """For polling: without reading the machine's certificates each time, which takes longer than the request."""
    return httpx.get(url, params=params, verify=False, timeout=120)


def ready(url: str) -> bool:
    try:
        return get(url + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running(settings: Settings, port: int = 0) -> Iterator[tuple[str, Server]]:
    """A real uvicorn on loopback, on a thread of this process, on any free port or on this one."""
    server = build_server(settings.model_copy(update={"port": port}))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        until(lambda: ready(url))
        yield url, server
    finally:
        server.should_exit = True
        thread.join(120)


@dataclass
class Replica:
    url: str
    process: subprocess.Popen[bytes]

    def metric(self, name: str) -> float:
        lines = get(self.url + "/metrics").text.splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def replica(log: Path | None = None, **settings: object) -> Iterator[Replica]:
    """A service in a process of its own, ready; its log goes to a file, if any. Killed in the end."""
    values = {"port": (port := free_port()), "threads": 1} | settings
    environment = {f"FULLRANK_{name.upper()}": str(value) for name, value in values.items()}
    with open(log, "ab") if log else nullcontext() as stderr:  # noqa: PTH123
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
            cwd=ROOT,
            stderr=stderr,
        )
    it = Replica(f"http://127.0.0.1:{port}", process)
    try:
        until(lambda: ready(it.url))
        yield it
    finally:
        process.kill()
        process.wait()
