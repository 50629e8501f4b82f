"""Checkpoints that other libraries wrote, and those libraries' own rows for images behind their own preprocessing.

The fixtures are made by `python benchmarks/importing/make.py --tiny --out tests/models/importers/fixtures`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.artifact import load, save
from models.embedder import Embedder
from models.importers import Options, import_encoder

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(it.parent.name for it in FIXTURES.glob("*/case.json"))


@pytest.mark.parametrize("name", CASES)
def test_our_rows_are_the_librarys_own(name: str, tmp_path: Path) -> None:
    """With the mean over images taken away, which leaves only what differs between them; and again from the disk."""
    folder = FIXTURES / name
    case = json.loads((folder / "case.json").read_text())
    expected = torch.from_numpy(np.load(folder / "rows.npy")).double()
    artifact, report = import_encoder(folder, Options(settings=case.get("settings", {})))
    assert report.kept == len(artifact.encoder.state_dict())
    save(artifact, tmp_path / "encoder")
    images = sorted((FIXTURES / "images").glob("*.png"))
    rows = Embedder(load(tmp_path / "encoder")).embed_files(images).double()
    assert rows.shape == expected.shape
    assert float(F.cosine_similarity(rows, expected).min()) > 0.999999
    assert float(F.cosine_similarity(rows - rows.mean(0), expected - expected.mean(0)).min()) > 0.9999


def test_the_fixtures_tell_images_apart() -> None:
    """Else the test above could not fail."""
    for name in CASES:
        rows = torch.from_numpy(np.load(FIXTURES / name / "rows.npy")).double()
        centred = F.normalize(rows - rows.mean(0))
        assert float((centred @ centred.T - 2 * torch.eye(len(rows))).max()) < 0.99
