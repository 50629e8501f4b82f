"""Makes tests/packaging/previous with the code of an earlier version: an encoder, and the state that a replica saved.

Run it from a checkout of that version, with its own environment:

    git worktree add /tmp/previous 4dc8543 && cd /tmp/previous && make .venv/dev
    PYTHONPATH=. .venv/bin/python .../tests/support/previous_version.py .../tests/packaging/previous
"""

import importlib
import json
import sys
from pathlib import Path

import torch


def make(out: Path) -> None:
    """Write encoder/, state/ and expected.json, which says what the earlier version read from them."""
    torch.set_num_threads(1)
    # By name: these are modules of the earlier version, which today's type checker cannot see.
    helpers = importlib.import_module("tests.service.conftest")
    healthy = importlib.import_module("fullrank.healthy")
    store = importlib.import_module("service.persistence").WindowStore
    metrics = importlib.import_module("service.metrics").Metrics
    library = importlib.import_module("fullrank")
    artifacts = importlib.import_module("models.artifact")
    embedders = importlib.import_module("models.embedder")

    artifact = helpers.write_encoder(out / "encoder", 2)
    embedder = embedders.Embedder(artifact)

    def rows(count: int, seed: int) -> torch.Tensor:
        found: torch.Tensor = embedder.embed(helpers.pictures(count, seed)[:, None])
        return found

    units = embedders.normalize(rows(1024, 2))
    basis = embedders.normalize(rows(1024, 1))
    reference = library.Reference.build(basis, units, canary=artifact.canary.embeddings)
    reference = healthy.calibrated(reference, units)
    old = artifacts.Artifact(artifact.card, artifact.encoder, reference, artifact.canary)
    artifact = artifacts.save(old, out / "encoder")

    monitor = library.SpectrumMonitor(artifact.card.dimension, reference)
    monitor.observe(rows(2048, 7))
    monitor.record_canary(embedder.embed(artifact.canary.images))
    monitor.close()
    keeper = store(out / "state", metrics("", "", ""))
    keeper.save(artifact.card.name, artifact.card.revision, monitor)
    keeper.close()
    (out / "state" / "lock").unlink()
    snapshot = monitor.snapshot()
    window = snapshot.windows[300.0]
    expected = {
        "version": importlib.import_module("service.version").VERSION,
        "revision": artifact.card.revision,
        "verdict": snapshot.verdict.state,
        "rows": window.rows,
        "effective_rank": window.effective_rank,
        "participation_ratio": window.participation_ratio.estimate,
        "bands": [band.ratio.estimate for band in window.bands],
        "embeddings": artifact.canary.embeddings[:4].tolist(),
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
