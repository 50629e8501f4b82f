"""What the demo's stack lacks: replicas that can be stopped and killed, Alertmanager, a webhook, rules in a hurry."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tools.stack import RULES, SERVE, StackError, call, free_port, process, wait

HURRY = 15  # times: five minutes pass in twenty seconds
ALERTMANAGER = RULES.parent.parent / "alertmanager" / "alertmanager.yml"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def hurried(text: str) -> str:
    """A Prometheus duration, shortened: "1m" -> "4s", at least a second."""
    number, unit = re.fullmatch(r"(\d+)([smhd])", text).groups()  # type: ignore[union-attr]
    return f"{max(1, round(int(number) * _UNITS[unit] / HURRY))}s"


def hurried_rules(folder: Path) -> Path:
    """The shipped rules with every `for` and every range shortened and nothing else changed, in `folder`."""
    folder.mkdir()
    for file in sorted(RULES.glob("*.yml")):
        content = yaml.safe_load(file.read_text())
        for rule in (rule for group in content["groups"] for rule in group["rules"]):
            rule["expr"] = re.sub(r"\[(\d+[smhd])\]", lambda found: f"[{hurried(found[1])}]", rule["expr"])
            for key in {"for", "keep_firing_for"} & rule.keys():
                rule[key] = hurried(rule[key])
        (folder / file.name).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder


@dataclass
class Replica:
    """A service in a process of its own, on a port of its own, which outlives its restarts."""

    folder: Path
    settings: dict[str, object]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def launch(self, **changes: object) -> subprocess.Popen[bytes]:
        """Start, without waiting."""
        settings = self.settings | {"host": "127.0.0.1", "port": self.port} | changes
        environment = os.environ | {f"FULLRANK_{name.upper()}": str(value) for name, value in settings.items()}
        with (self.folder / f"service-{self.port}.log").open("ab") as log:
            command = [sys.executable, "-c", SERVE]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        return self.process

    def start(self, **changes: object) -> None:
        """Start, and wait until it is ready. Raises StackError."""
        child = self.launch(**changes)
        if not wait(lambda: child.poll() is not None or self.ready(), 120) or child.poll() is not None:
            raise StackError(f"a replica did not come up; see {self.folder}/service-{self.port}.log")

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> None:
        """End the process by a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(sent)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def ready(self) -> bool:
        try:
            call(f"{self.url}/readyz", timeout=2)
        except (OSError, StackError):
            return False
        return True

    def spectrum(self) -> dict[str, Any]:
        """GET /spectrum."""
        answer: dict[str, Any] = json.loads(call(f"{self.url}/spectrum"))
        return answer

    def swap(self, name: str, gate: str) -> tuple[int, str]:
        """The status of a hot swap, and the judgement's or the error's words."""
        try:
            answer = json.loads(call(f"{self.url}/admin/encoders", {"name": name, "gate": gate}, timeout=120))
        except StackError as error:
            found = re.search(r": (\d{3}) (\{.*)", str(error), re.DOTALL)
            if found is None:
                raise
            return int(found[1]), json.loads(found[2])["error"]["message"]
        return 200, (answer["judgement"] or {}).get("reason", "not judged")


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
            route[key] = hurried(route[key])
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
