"""The plain thread batcher most people write: FastAPI, a queue, one thread that decodes and embeds what waits."""

import asyncio
import os
import queue
import threading

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.serving.workload import MAX_BATCH, Workload

app, workload = FastAPI(), Workload.from_environment()
waiting: queue.Queue[tuple[bytes, asyncio.AbstractEventLoop, asyncio.Future[bytes]]] = queue.Queue()


def run() -> None:
    while True:
        batch = [waiting.get()]
        while len(batch) < MAX_BATCH and not waiting.empty():
            batch.append(waiting.get())
        rows = workload([data for data, _, _ in batch])
        for (_, loop, future), row in zip(batch, rows, strict=True):
            loop.call_soon_threadsafe(future.set_result, row.tobytes())


@app.post("/embed")
async def embed(request: Request) -> Response:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()
    waiting.put((await request.body(), loop, future))
    return Response(await future, media_type="application/octet-stream")


threading.Thread(target=run, daemon=True).start()
uvicorn.run(app, port=int(os.environ["BENCH_PORT"]), access_log=False, log_level="warning")
