"""A service whose process can be stopped, killed and started again on the same port."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.stack import SERVE, StackError, call, free_port, wait


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
