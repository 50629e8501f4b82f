"""LitServe: its hooks; requests and answers are JSON, the only kind of body its hooks get."""

import base64
import os
from typing import Any

import litserve as ls  # type: ignore[import-not-found,unused-ignore]

from benchmarks.serving.workload import MAX_BATCH, Workload


class Embed(ls.LitAPI):  # type: ignore[misc,unused-ignore]
    def setup(self, device: str) -> None:
        self.workload = Workload.from_environment()

    def decode_request(self, request: dict[str, str]) -> Any:
        return self.workload.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[Any]) -> Any:
        return self.workload.forward(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, str]:
        return {"embedding": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    api = Embed(max_batch_size=MAX_BATCH, batch_timeout=0.002, api_path="/embed")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="warning")
