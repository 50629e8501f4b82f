"""What POST /embed costs the event loop, through FastAPI and past it (docs/decisions/fastapi-and-its-bypass.md).

    python -m benchmarks.bypass [--requests N]

The application is called as a server would call it, without sockets. Counted is the CPU time of the event loop's own
thread, so that neither the encoder's threads nor other programs on the machine are in it. The two ways take turns.
"""

import argparse
import asyncio
import math
import statistics
import time
from pathlib import Path

from service.http.app import create_app
from service.http.direct import DirectAPI
from service.settings import Settings

IMAGE = Path(__file__).resolve().parents[1] / "examples" / "ankle-boot.png"
ROUNDS = 8


async def ask(app: DirectAPI, body: bytes) -> int:
    """The status of one POST /embed with one image as its body."""
    status = 0

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, object]) -> None:
        nonlocal status
        status = int(str(message.get("status", status)))

    headers = [(b"host", b"localhost"), (b"content-type", b"image/png"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/embed",
        "raw_path": b"/embed",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
    }
    await app(scope, receive, send)  # type: ignore[arg-type]
    return status


async def cost(app: DirectAPI, body: bytes, requests: int) -> float:
    """CPU microseconds of this thread for each request, one after the other."""
    started = time.thread_time()
    for _ in range(requests):
        assert await ask(app, body) == 200
    return (time.thread_time() - started) / requests * 1e6


async def measure(requests: int) -> dict[str, list[float]]:
    """way -> a figure for each round."""
    app = create_app(Settings.model_validate({"threads": 1, "monitor_rate": math.inf}))
    body = IMAGE.read_bytes()
    found: dict[str, list[float]] = {"through FastAPI": [], "past it": []}
    async with app.router.lifespan_context(app):
        while await ask(app, body) != 200:
            await asyncio.sleep(0.05)
        direct = app._direct
        for _ in range(ROUNDS):
            for way, routes in (("through FastAPI", {}), ("past it", direct)):
                app._direct = routes
                await cost(app, body, requests // 10)
                found[way].append(await cost(app, body, requests))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=400, help="in each of the rounds")
    found = asyncio.run(measure(parser.parse_args().requests))
    for way, figures in found.items():
        low, high = min(figures), max(figures)
        print(f"{way:<16} {statistics.median(figures):6.0f} us of CPU a request  [{low:.0f}, {high:.0f}]")


if __name__ == "__main__":
    main()
