"""Ours, as `fullrank serve` starts it."""

import os
from pathlib import Path
from typing import Any

import service.encoders.prepare
from benchmarks.serving.workload import NullEmbedder
from service.http.app import serve
from service.settings import Settings

if os.environ["BENCH_MODEL"] == "null":
    service.encoders.prepare.Embedder = NullEmbedder  # type: ignore[attr-defined]
values: dict[str, Any] = {
    "encoder": Path(os.environ["BENCH_FOLDER"], os.environ["BENCH_MODEL"]),
    "port": int(os.environ["BENCH_PORT"]),
}
serve(Settings(**values))
