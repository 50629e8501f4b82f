"""Ray Serve: one replica with @serve.batch, raw bytes in and out."""

import os
import time

import ray  # type: ignore[import-not-found,unused-ignore]
from ray import serve  # type: ignore[import-not-found,unused-ignore]
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.serving.workload import MAX_BATCH, Rows, Workload


@serve.deployment(max_ongoing_requests=256)  # type: ignore[untyped-decorator,unused-ignore]
class Embed:
    def __init__(self) -> None:
        self.workload = Workload.from_environment()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)  # type: ignore[untyped-decorator,unused-ignore]
    async def batch(self, images: list[bytes]) -> Rows:
        return self.workload(images)

    async def __call__(self, request: Request) -> Response:
        row = await self.batch(await request.body())
        return Response(row.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    serve.run(
        Embed.bind(),  # type: ignore[attr-defined,unused-ignore]
        route_prefix="/embed",
    )
    while True:
        time.sleep(60)
