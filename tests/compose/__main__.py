"""docker-compose.yml on a real engine, from an image to a notification: python -m tests.compose

Builds the image, starts the stack, embeds real images over HTTP, swaps to the collapsed encoder inside the container
(administration answers on loopback only), and follows the alert through Prometheus and Alertmanager to a webhook. Takes
about five minutes, since the windows are the real ones. It uses docker-compose.yml's ports and removes what it started.
With --demo the profile demo sends the images and swaps the encoder, from its own container.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.demo.traffic import Traffic, encoded
from tools.stack import Prometheus, StackError, call, wait
from training.data import SAMPLE, read_fashion_mnist

ROOT = Path(__file__).resolve().parents[2]
PROJECT, IMAGE, WEBHOOK = "fullrank-test", "fullrank:0.1.0", "fullrank-test-webhook"
EMBED, PROMETHEUS, ALERTMANAGER = "http://127.0.0.1:8000", "http://127.0.0.1:9090", "http://127.0.0.1:9093"
SWAP = (
    "import json, urllib.request; request = urllib.request.Request('http://127.0.0.1:8000/admin/encoders', "
    "json.dumps({'name': 'fashion-collapsed', 'gate': 'warn'}).encode(), {'Content-Type': 'application/json'}); "
    "print(urllib.request.urlopen(request).read().decode())"
)
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


@contextmanager
def stack(services: list[str], files: Sequence[Path] = ()) -> Iterator[None]:
    """The services up, and a webhook beside them; all gone afterwards, their volumes too. `files` override."""
    layers = [part for file in (ROOT / "docker-compose.yml", *files) for part in ("-f", str(file))]
    try:
        compose(*layers, "up", "-d", *services)
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


def follow(services: list[str], demo: bool) -> None:
    """Every step from `up` to the notification. Raises StackError at the first that fails."""
    pictures = encoded(read_fashion_mnist(SAMPLE, "test").images)
    server, steps = Prometheus(PROMETHEUS), Steps()
    with stack(services):
        steps.reached("the service is ready", lambda: b"ready" in call(f"{EMBED}/readyz"), 180)
        answer = json.loads(call(f"{EMBED}/embed", {"images": pictures[:2]}))
        print(f"          POST /embed: {len(answer['embeddings'])} rows of {answer['dimension']} by {answer['model']}")
        user = compose("exec", "-T", "embed", "id", "-u").strip()
        if user == "0":
            raise StackError("the service runs as root")
        print(f"          it runs as user {user}")
        steps.reached("Prometheus scrapes it", lambda: server.value('up{job="fullrank"}') == 1, 60)
        with demo_traffic() if demo else Traffic(EMBED, pictures, rate=20):
            healthy = 'fullrank_verdict{state="healthy"}'
            steps.reached("its traffic is judged healthy", lambda: server.value(healthy) == 1, 240)
            if demo:
                played = ("--profile", "demo", "logs", "demo")
                collapsed = "serving fashion-collapsed"
                steps.reached("the demo swaps to the collapsed encoder", lambda: collapsed in compose(*played), 180)
            else:
                answer = json.loads(compose("exec", "-T", "embed", "python", "-c", SWAP))
                print(f"          swapped to {answer['served']['model']}: {answer['judgement']['reason']}", flush=True)
            start = steps.mark = time.monotonic()
            firing: Callable[[], bool] = lambda: any(a["state"] == "firing" for a in server.alerts())  # noqa: E731
            steps.reached("an alert fires in Prometheus", firing, 360)
            received: Callable[[], Any] = lambda: json.loads(call(f"{ALERTMANAGER}/api/v2/alerts"))  # noqa: E731
            steps.reached("it reaches Alertmanager", lambda: bool(received()), 60)
            steps.reached("the webhook is called", lambda: bool(notified()), 90)
            print(f"          {time.monotonic() - start:.0f} s after the swap")
            for alert in notified():
                print(f"          {alert['labels']['alertname']}: {alert['annotations']['summary']}")


@contextmanager
def demo_traffic() -> Iterator[None]:
    """The container of the profile demo."""
    compose("--profile", "demo", "up", "-d", "--no-deps", "demo")
    try:
        yield
    finally:
        compose("--profile", "demo", "rm", "-f", "-s", "demo")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--no-build", action="store_true", help=f"use the image {IMAGE} as it is")
    parser.add_argument("--grafana", action="store_true", help="start Grafana too, where its image can be pulled")
    parser.add_argument("--demo", action="store_true", help="let the profile demo play")
    arguments = parser.parse_args()
    services = ["embed", "prometheus", "alertmanager"] + ["grafana"] * arguments.grafana
    try:
        if not arguments.no_build:
            compose("build", "embed")
        follow(services, arguments.demo)
    except StackError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
