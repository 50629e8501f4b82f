"""A real Alertmanager under the shipped configuration, and a webhook that it notifies."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.support.hurry import sped_up
from tools.stack import RULES, StackError, free_port, process

ALERTMANAGER = RULES.parent.parent / "alertmanager" / "alertmanager.yml"


@dataclass(frozen=True)
class Notice:
    """An alert that reached the webhook firing: when first (monotonic seconds), and whose it is."""

    at: float
    alert: str
    severity: str
    instance: str


class Webhook:
    """A receiver of Alertmanager's notifications."""

    def __init__(self) -> None:
        self._notices: dict[tuple[str, str], Notice] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self) -> "Webhook":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def since(self, mark: float) -> list[Notice]:
        """Alerts that came for the first time after `mark` (monotonic seconds)."""
        return [notice for notice in list(self._notices.values()) if notice.at >= mark]

    def _take(self, body: dict[str, Any]) -> None:
        for alert in body["alerts"]:
            key, labels = (alert["fingerprint"], alert["startsAt"]), alert["labels"]
            if alert["status"] == "firing" and key not in self._notices:
                name, severity = labels["alertname"], labels["severity"]
                self._notices[key] = Notice(time.monotonic(), name, severity, labels.get("instance", ""))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        return Handler


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """An Alertmanager under the shipped configuration, its waits shortened; yields its address."""
    binary = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if binary is None:
        raise StackError(
            "there is no `alertmanager` on the PATH; on Debian and Ubuntu: apt install prometheus-alertmanager"
        )
    content = yaml.safe_load(ALERTMANAGER.read_text())
    for route in (content["route"], *content["route"].get("routes", ())):
        for key in {"group_wait", "group_interval"} & route.keys():
            route[key] = sped_up(route[key])
    for receiver in content["receivers"]:
        for hook in receiver.get("webhook_configs", ()):
            hook["url"] = webhook
    file = folder / "alertmanager.yml"
    file.write_text(yaml.safe_dump(content))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={file}", f"--storage.path={folder / 'alertmanager'}"]
    command += [f"--web.listen-address={address}", "--cluster.listen-address="]
    with process(command, folder / "alertmanager.log", f"http://{address}/-/ready"):
        yield address
