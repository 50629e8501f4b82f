"""BentoML: one service, adaptive batching, images as base64 in JSON."""

import base64

import bentoml  # type: ignore[import-not-found,unused-ignore]
import numpy as np

from benchmarks.serving.workload import MAX_BATCH, Workload


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})  # type: ignore[untyped-decorator,unused-ignore]
class Embed:
    def __init__(self) -> None:
        self.workload = Workload.from_environment()

    @bentoml.api(  # type: ignore[untyped-decorator,unused-ignore]
        batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=10_000
    )
    def embed(self, images: list[str]) -> np.ndarray:  # type: ignore[type-arg,unused-ignore]
        return self.workload([base64.b64decode(image) for image in images])
