"""What an earlier version wrote is read by today's code: an encoder, what it called it, the saved windows, the verdict.

tests/support/previous_version.py made the files, with the earlier version's own code.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli import app
from fullrank import SpectrumMonitor, __version__
from models.artifact import Artifact, load
from models.embedder import Embedder, normalize
from service.metrics import Metrics
from service.watching.persistence import WindowStore

PREVIOUS = Path(__file__).parent / "previous"
EXPECTED = json.loads((PREVIOUS / "expected.json").read_text())
(STATE,) = (PREVIOUS / "state").glob("*.safetensors")


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return load(PREVIOUS / "encoder")


def test_the_encoder_is_the_same_encoder(artifact: Artifact) -> None:
    assert artifact.card.is_of(EXPECTED["revision"])
    assert artifact.canary is not None
    rows = normalize(Embedder(artifact).embed(artifact.canary.images[:4]))
    torch.testing.assert_close(rows, torch.tensor(EXPECTED["embeddings"]), atol=1e-5, rtol=0)
    assert artifact.reference is not None
    assert artifact.reference.calibration is not None


def test_it_passes_the_gate() -> None:
    done = CliRunner().invoke(app, ["check", str(PREVIOUS / "encoder"), "--json"])
    assert done.exit_code == 0, done.output


def test_the_windows_are_resumed_with_their_figures_and_verdict(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PREVIOUS / "state", tmp_path / "state")
    saved = float(load_file(STATE)["saved"])
    monkeypatch.setattr(time, "time", lambda: saved + 30)  # as if the upgrade took half a minute
    store = WindowStore(tmp_path / "state", Metrics(__version__, "", "cpu"))
    with SpectrumMonitor(artifact.card.dimension, artifact.reference) as monitor:
        assert store.restore(artifact.card.name, EXPECTED["revision"], monitor)
        snapshot = monitor.snapshot()
        window = snapshot.windows[300.0]
        assert window.rows == EXPECTED["rows"]
        assert window.effective_rank == pytest.approx(EXPECTED["effective_rank"], rel=1e-9)
        assert window.participation_ratio.estimate == pytest.approx(EXPECTED["participation_ratio"], rel=1e-9)
        assert [band.ratio.estimate for band in window.bands] == pytest.approx(EXPECTED["bands"], rel=1e-9)
        assert snapshot.verdict.state == EXPECTED["verdict"]
        store.save(artifact.card.name, EXPECTED["revision"], monitor)
    store.close()
    again = WindowStore(tmp_path / "state", Metrics(__version__, "", "cpu"))
    with SpectrumMonitor(artifact.card.dimension, artifact.reference) as monitor:
        assert again.restore(artifact.card.name, EXPECTED["revision"], monitor)
        assert monitor.snapshot().windows[300.0].rows == EXPECTED["rows"]
    again.close()
