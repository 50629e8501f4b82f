"""docker-compose.yml's stack on a Docker engine, with a webhook beside it."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.stack import StackError, wait

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "compose" / "demo.yml"
PROJECT, IMAGE, WEBHOOK = "fullrank-test", "fullrank:0.2.0", "fullrank-test-webhook"
RECEIVER = """
import http.server
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("", 8080), Receiver).serve_forever()
"""


def run(*command: str) -> str:
    """Standard output. Raises StackError with standard error."""
    environment = os.environ | {"ALERT_WEBHOOK_URL": f"http://{WEBHOOK}:8080/", "DEMO_HEALTHY_SECONDS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def compose(*arguments: str) -> str:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return run(*(["docker", "compose"] if plugin else ["docker-compose"]), "-p", PROJECT, *arguments)


def layers(*files: Path) -> list[str]:
    """The options that lay files over docker-compose.yml."""
    return [part for file in (ROOT / "docker-compose.yml", *files) for part in ("-f", str(file))]


@contextmanager
def stack(services: list[str], files: Sequence[Path] = ()) -> Iterator[None]:
    """The services up, and a webhook beside them; all gone afterwards, their volumes too. `files` override."""
    try:
        compose(*layers(*files), "up", "-d", *services)
        network = ("--network", f"{PROJECT}_default")
        run("docker", "run", "-d", "--rm", "--name", WEBHOOK, *network, IMAGE, "python", "-c", RECEIVER)
        yield
    finally:
        subprocess.run(["docker", "rm", "-f", WEBHOOK], capture_output=True, check=False)
        compose("down", "-v")


def notified() -> list[dict[str, Any]]:
    """The firing alerts of every notification so far."""
    bodies = [json.loads(line) for line in run("docker", "logs", WEBHOOK).splitlines() if line]
    return [alert for body in bodies for alert in body["alerts"] if alert["status"] == "firing"]


class Steps:
    """Prints each step with the seconds it took, and stops at the first that does not come about."""

    def __init__(self) -> None:
        self.mark = time.monotonic()

    def reached(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        def holds() -> bool:
            try:
                return condition()
            except (OSError, StackError):  # not up yet
                return False

        if not wait(holds, seconds, 1.0):
            raise StackError(f"not within {seconds:.0f} s: {what}\n{compose('ps')}\n{compose('logs', '--tail=15')}")
        print(f"{time.monotonic() - self.mark:6.1f} s  {what}", flush=True)
        self.mark = time.monotonic()
