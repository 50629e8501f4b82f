"""docker-compose.yml on a real engine, from an image to a notification: python -m tests.compose

Builds the image, starts the stack, embeds real images over HTTP, swaps to the collapsed encoder inside the container
(administration answers on loopback only), and follows the alert through Prometheus and Alertmanager to a webhook. Takes
about five minutes, since the windows are the real ones. It uses docker-compose.yml's ports and removes what it started.
With --demo the container of deploy/compose/demo.yml sends the images and swaps the encoder, from its own container.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.compose.engine import DEMO, IMAGE, Steps, compose, layers, notified, stack
from tools.demo.traffic import Traffic, encoded
from tools.stack import Prometheus, StackError, call
from training.data import SAMPLE, read_fashion_mnist

EMBED, PROMETHEUS, ALERTMANAGER = "http://127.0.0.1:8000", "http://127.0.0.1:9090", "http://127.0.0.1:9093"
SWAP = (
    "import json, urllib.request; request = urllib.request.Request('http://127.0.0.1:8000/admin/encoders', "
    "json.dumps({'name': 'fashion-collapsed', 'gate': 'warn'}).encode(), {'Content-Type': 'application/json'}); "
    "print(urllib.request.urlopen(request).read().decode())"
)


def follow(services: list[str], demo: bool) -> None:
    """Every step from `up` to the notification. Raises StackError at the first that fails."""
    pictures = encoded(read_fashion_mnist(SAMPLE, "test").images)
    server, steps = Prometheus(PROMETHEUS), Steps()
    with stack(services, files=[DEMO]):  # which lets the service see the collapsed encoder
        steps.reached("the service is ready", lambda: b"ready" in call(f"{EMBED}/readyz"), 600)
        answer = json.loads(call(f"{EMBED}/embed", {"images": pictures[:2]}))
        print(f"          POST /embed: {len(answer['embeddings'])} rows of {answer['dimension']} by {answer['model']}")
        user = compose("exec", "-T", "embed", "id", "-u").strip()
        if user == "0":
            raise StackError("the service runs as root")
        print(f"          it runs as user {user}")
        steps.reached("Prometheus scrapes it", lambda: server.value('up{job="fullrank"}') == 1, 300)
        with demo_traffic() if demo else Traffic(EMBED, pictures, rate=20):
            healthy = 'fullrank_verdict{state="healthy"}'
            steps.reached("its traffic is judged healthy", lambda: server.value(healthy) == 1, 600)
            if demo:
                played = (*layers(DEMO), "logs", "demo")
                collapsed = "serving fashion-collapsed"
                steps.reached("the demo swaps to the collapsed encoder", lambda: collapsed in compose(*played), 600)
            else:
                answer = json.loads(compose("exec", "-T", "embed", "python", "-c", SWAP))
                print(f"          swapped to {answer['served']['model']}: {answer['judgement']['reason']}", flush=True)
            start = steps.mark = time.monotonic()
            firing: Callable[[], bool] = lambda: any(a["state"] == "firing" for a in server.alerts())  # noqa: E731
            steps.reached("an alert fires in Prometheus", firing, 900)
            received: Callable[[], Any] = lambda: json.loads(call(f"{ALERTMANAGER}/api/v2/alerts"))  # noqa: E731
            steps.reached("it reaches Alertmanager", lambda: bool(received()), 300)
            steps.reached("the webhook is called", lambda: bool(notified()), 300)
            print(f"          {time.monotonic() - start:.0f} s after the swap")
            for alert in notified():
                print(f"          {alert['labels']['alertname']}: {alert['annotations']['summary']}")


@contextmanager
def demo_traffic() -> Iterator[None]:
    """The container of the demonstration."""
    compose(*layers(DEMO), "up", "-d", "--no-deps", "demo")
    try:
        yield
    finally:
        compose(*layers(DEMO), "rm", "-f", "-s", "demo")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--no-build", action="store_true", help=f"use the image {IMAGE} as it is")
    parser.add_argument("--grafana", action="store_true", help="start Grafana too, where its image can be pulled")
    parser.add_argument("--demo", action="store_true", help="let the demonstration's own container play")
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
