"""Sends the traffic of deploy/compose/demo.yml: real images, first to a healthy encoder, then to a collapsed one.

    python -m tools.demo.play

Sends Fashion-MNIST images to a service on this host, at a rate at which none comes twice within five minutes, swaps to
the collapsed encoder with gate=warn, so that the healthy one's reference stays the comparison, and goes on until ended.
"""

import argparse
import json
import os
import signal
import threading
from typing import Any

import torch

from tools.demo import COLLAPSED, HEALTHY
from tools.demo.traffic import Traffic, encoded
from tools.stack import START, StackError, call, wait
from training.data import SAMPLE, read_fashion_mnist

RATE = 6.0  # images a second: the sample's 2,000 images in 333 s


def swap(url: str, key: str, name: str, gate: str) -> None:
    answer: dict[str, Any] = json.loads(
        call(f"{url}/admin/encoders", {"name": name, "gate": gate}, timeout=START, key=key)
    )
    judgement = answer["judgement"] or {"reason": "not judged"}
    print(f"serving {answer['served']['model']}: {judgement['reason']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the service; on loopback, or FULLRANK_API_KEY set"
    )
    parser.add_argument("--healthy", default=HEALTHY, help="name of the first encoder")
    parser.add_argument("--collapsed", default=COLLAPSED.name, help="name of the one swapped in")
    parser.add_argument("--healthy-seconds", type=float, default=420.0, help="how long before the swap")
    arguments = parser.parse_args()
    url = arguments.url
    key = os.environ.get("FULLRANK_API_KEY", "")

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    splits = [read_fashion_mnist(SAMPLE, split).images for split in ("test", "train")]
    pictures = encoded(torch.cat(splits))

    def ready() -> bool:
        try:
            return bool(call(f"{url}/readyz"))
        except (OSError, StackError):
            return ended.is_set()

    if not wait(ready, START, 1.0):
        raise SystemExit(f"{url}/readyz did not answer within {START} s; is the service up?")
    if json.loads(call(f"{url}/info"))["encoder"]["name"] != arguments.healthy:
        swap(url, key, arguments.healthy, "off")  # played before, and restarted
    with Traffic(url, pictures, RATE, batch=6, key=key) as traffic:
        print(f"{len(pictures)} images at {RATE:g} a second to {arguments.healthy}", flush=True)
        if not ended.wait(arguments.healthy_seconds):
            swap(url, key, arguments.collapsed, "warn")
            print("EmbeddingDirectionsDied is expected within a few minutes: http://127.0.0.1:9090/alerts", flush=True)
            ended.wait()
    print(f"{traffic.answered} images embedded, {traffic.failed} not answered", flush=True)


if __name__ == "__main__":
    main()
