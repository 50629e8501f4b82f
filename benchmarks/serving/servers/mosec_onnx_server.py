"""mosec in front of onnxruntime: the embedding stage runs the exported graph itself, on one thread."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped,unused-ignore]
from mosec import Server, Worker  # type: ignore[import-not-found,unused-ignore]

from benchmarks.serving.servers.mosec_server import Decode
from benchmarks.serving.workload import MAX_BATCH, Workload


class Embed(Worker):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.workload = None
        if os.environ["BENCH_MODEL"] == "null":
            self.workload = Workload.from_environment()
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = Path(os.environ["BENCH_FOLDER"], f"{os.environ['BENCH_MODEL']}-onnx", "encoder.onnx")
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def forward(self, data: list[Any]) -> list[bytes]:
        if self.workload is not None:
            return [row.tobytes() for row in self.workload.forward(data)]
        rows = self.session.run(None, {"pixels": np.stack(data)})[0]
        return [row.tobytes() for row in rows / np.linalg.norm(rows, axis=1, keepdims=True)]

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1)
    server.append_worker(Embed, num=1, max_batch_size=MAX_BATCH, max_wait_time=1)
    server.run()
