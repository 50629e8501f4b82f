"""Runs the service and a real Prometheus as child processes on loopback, for the demonstration and the tests."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULES = Path(__file__).resolve().parents[1] / "deploy" / "prometheus" / "rules"
_RESERVED: list[socket.socket] = []
START = 300  # seconds that a process gets to start; long, for loaded machines
SERVE = "from service.http.app import serve; from service.settings import Settings; serve(Settings())"


class StackError(RuntimeError):
    """Raised if a part is missing or did not start. The message says which, and what to do."""


def call(
    url: str, body: Any = None, *, accept: str = "application/json", timeout: float = 60.0, key: str = ""
) -> bytes:
    """GET, or POST `body` as JSON. Raises OSError if there is no answer, and StackError if the answer is an error."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": accept} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        raise StackError(f"{url}: {error.code} {error.read().decode(errors='replace')}") from error


@contextmanager
def service(folder: Path, port: int = 0, **settings: object) -> Iterator[str]:
    """Run a service until the with block ends, with its log in `folder`. Yields its address once it is ready.

    settings: those of service.settings.
    """
    port = port or free_port()
    variables = {"host": "127.0.0.1", "port": port, **settings}
    environment = os.environ | {f"FULLRANK_{name.upper()}": str(value) for name, value in variables.items()}
    url = f"http://127.0.0.1:{port}"
    with process([sys.executable, "-c", SERVE], folder / f"service-{port}.log", f"{url}/readyz", environment):
        yield url


@dataclass(frozen=True)
class Prometheus:
    """A client of Prometheus' HTTP API."""

    url: str

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and value of every series of an instant vector."""
        result = self._get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        """The value of the first series, NaN if there is none."""
        return next((value for _, value in self.query(expression)), math.nan)

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts pending or firing, with labels, annotations and state."""
        alerts: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return alerts

    def _get(self, what: str, **parameters: str) -> Any:
        return json.loads(call(f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"))["data"]


def prometheus_binary() -> str:
    """The path of the prometheus binary. Raises StackError, naming the package to install, if there is none."""
    path = shutil.which("prometheus")
    if path is None:
        raise StackError("there is no `prometheus` on the PATH; on Debian and Ubuntu: apt install prometheus")
    return path


@contextmanager
def prometheus(
    folder: Path,
    targets: list[str],
    *,
    windows: dict[str, str] | None = None,
    alertmanagers: list[str] | None = None,
    rules: Path = RULES,
    period: int = 1,
) -> Iterator[Prometheus]:
    """Run a Prometheus with the shipped rules that scrapes `targets` (host:port). `folder` gets its data.

    period: seconds between scrapes, and how long it waits for one. A failed scrape sets pending alerts back to zero.
    `windows` maps a service's short windows to those the rules read, {"20s": "5m"}, so that the rules run unchanged.
    """
    relabel = [
        {"source_labels": ["window"], "regex": short, "target_label": "window", "replacement": long}
        for short, long in (windows or {}).items()
    ]
    scrape = {"job_name": "fullrank", "static_configs": [{"targets": targets}], "metric_relabel_configs": relabel}
    configuration = {
        "global": {"scrape_interval": f"{period}s", "scrape_timeout": f"{period}s", "evaluation_interval": "1s"},
        "rule_files": [str(rules / "*.yml")],
        "scrape_configs": [scrape],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": alertmanagers or []}]}]},
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(configuration, indent=2))  # JSON is YAML
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [prometheus_binary(), f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with process(command, folder / "prometheus.log", f"{url}/-/ready"):
        yield Prometheus(url)


def wait(condition: Callable[[], bool], seconds: float, period: float = 0.2) -> bool:
    """Wait until `condition` is true; False if it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(period)
    return True


def free_port() -> int:
    """A free TCP port on loopback. While this process lives, only servers can bind it, not outgoing connections."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    _RESERVED.append(probe)  # if it were closed, an outgoing connection could take the port before its server starts
    port: int = probe.getsockname()[1]
    return port


@contextmanager
def process(command: list[str], log: Path, ready: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Run a child process until the with block ends, which sends SIGTERM. It is up once the URL `ready` answers."""
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        if not wait(lambda: child.poll() is not None or _answers(ready), START) or child.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StackError(f"{Path(command[0]).name} did not come up within {START} s; the end of {log}:\n{tail}")
        yield
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(url: str) -> bool:
    try:
        call(url, timeout=2)
    except (OSError, StackError):
        return False
    return True
