"""mosec: a Rust front end, and two stages as in its image examples, each a Python process."""

from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found,unused-ignore]

from benchmarks.serving.workload import MAX_BATCH, Workload


class Decode(Worker):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.workload = Workload.from_environment()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        return self.workload.decode(data)


class Embed(Worker):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.workload = Workload.from_environment()

    def forward(self, data: list[Any]) -> list[bytes]:
        return [row.tobytes() for row in self.workload.forward(data)]

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1)
    server.append_worker(Embed, num=1, max_batch_size=MAX_BATCH, max_wait_time=1)
    server.run()
