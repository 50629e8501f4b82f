"""The application of scale/serve.py, but the replica that a file names gives almost the same row for every image."""

import os
from pathlib import Path
from typing import Any

from ray import serve

import models.embedder
import scale.serve
from models.engines import Engine, Pixels, Rows, start
from scale.serve import Arguments, ReplicaDeployment
from tests.support.ray_cluster import MARK


def broken(folder: Path) -> Path:
    """The file in a cluster's folder that names the replica."""
    return folder / "broken"


class Faulty:
    """An engine that collapses while the file names this replica."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._file = broken(Path(os.environ[MARK]))
        self._replica = serve.get_replica_context().replica_id.unique_id
        self.name = engine.name

    def __call__(self, pixels: Pixels) -> Rows:
        rows = self._engine(pixels)
        if self._file.exists() and self._file.read_text() == self._replica:
            rows = 1 + rows / 1000
        return rows

    def record(self) -> None:
        self._engine.record()


class FaultyDeployment(ReplicaDeployment):
    """A replica whose engines may collapse."""

    def __init__(self, settings: dict[str, Any], cpus: float, period: float) -> None:
        models.embedder.start = lambda *arguments: Faulty(start(*arguments))  # type: ignore[assignment]
        super().__init__(settings, cpus, period)


def app(arguments: Arguments) -> Any:
    """See scale.serve.app."""
    scale.serve.ReplicaDeployment = FaultyDeployment  # type: ignore[misc]
    return scale.serve.app(arguments)
