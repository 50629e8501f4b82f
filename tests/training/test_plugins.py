"""Somebody's own method, backbone and data set, from a folder that is no part of this repository."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cli import app
from models.artifact import load as load_artifact
from models.embedder import Embedder
from training import plugins
from training.data import SOURCES
from training.evaluate import Spectrum
from training.methods import METHODS
from training.plugins import BACKBONES, PluginError

PLUGIN = """
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from models.backbones import Encoder
from training.data import ImageSet, Source
from training.methods.base import Method, wide
from training.plugins import register_backbone, register_data, register_method


@wide
def distance(z1, z2, spread):
    return F.mse_loss(z1, z2) + spread * F.relu(1 - torch.cat([z1, z2]).std(0)).mean()


@dataclass(frozen=True, kw_only=True)
class Options:
    spread: float = 1.0


class Hinge(Method):
    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.spread = options.spread
        self.projector = nn.Linear(encoder.dimension, 8)

    def forward(self, views):
        return distance(*self.project(self.encoder(views)).chunk(2), self.spread)


class Tiny(Encoder):
    def __init__(self, channels):
        super().__init__()
        self.dimension = 12
        self.layers = nn.Sequential(nn.Conv2d(channels, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, x):
        return torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1)


class Sums(Tiny):
    def forward(self, x):
        return super().forward(x).cumsum(1)


def read(folder, split):
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(900) % 3
    images = torch.randint(0, 120, (900, 1, 16, 16), generator=generator) + 40 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels)


def register():
    register_method("hinge", Hinge)
    register_backbone("tiny", lambda size, channels: Tiny(channels))
    register_backbone("sums", lambda size, channels: Sums(channels))
    register_backbone("bare", lambda size, channels: nn.Conv2d(channels, 12, 3))
    register_data("noise", Source(read, Path("."), 16, 1, (0.4,), (0.2,), "CC0-1.0", redistributable=True))
"""


def fullrank(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, as the one the command runs in; what the plugin registers is forgotten afterwards."""
    (tmp_path / "their_plugin.py").write_text(PLUGIN)
    (tmp_path / "ends.py").write_text("raise SystemExit('bye')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("their_plugin", None)
    METHODS.pop("hinge", None)
    SOURCES.pop("noise", None)
    BACKBONES.clear()


def test_own_method_backbone_and_data_train_into_an_encoder_that_needs_no_plugin(elsewhere: Path) -> None:
    flags = ("--plugin", "their_plugin:register", "--method", "hinge", "--dataset", "noise", "--backbone", "tiny")
    flags += ("--name", "theirs", "--epochs", "2", "--batch-size", "64", "--option", "spread=2.0", "--threads", "1")
    done = fullrank("train", "fashion-simclr", *flags, "--out", "run", "--json")
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    assert (card["training"]["method"], card["training"]["options"]) == ("hinge", {"spread": 2.0})
    assert (card["dimension"], card["canary_licence"]) == (12, "CC0-1.0")
    assert 0.3 < card["quality"]["knn"] <= 1
    evaluated = fullrank("evaluate", "run", "--plugin", "their_plugin:register", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout)["knn"] == card["quality"]["knn"]
    exported = fullrank(
        "export", "run/checkpoint.pt", "--safetensors", "--out", "last", "--plugin", "their_plugin:register"
    )
    assert exported.exit_code == 0, exported.output
    assert load_artifact(Path("last")).card.revision == load_artifact(Path("run/encoder")).card.revision
    BACKBONES.clear()
    refused = fullrank("export", "run/checkpoint.pt", "--safetensors", "--out", "none")
    assert "no plugin brings the backbone 'tiny'; name it with --plugin" in refused.stderr
    for folder in (Path("run/encoder"), Path("run/encoders/epoch-0002")):
        artifact = load_artifact(folder)
        assert artifact.module is None
        assert artifact.canary is not None
        rows = Embedder(artifact).embed(artifact.canary.images)
        expected = artifact.canary.embeddings
        torch.testing.assert_close(rows / rows.norm(dim=1, keepdim=True), expected, rtol=0, atol=1e-4)
    assert fullrank("train", "--resume", "--out", "run").exit_code == 0, "the run knows its plugins"
    Path("their_plugin.py").rename("renamed_plugin.py")
    sys.modules.pop("their_plugin")
    METHODS.pop("hinge")
    SOURCES.pop("noise")
    moved = fullrank("train", "--resume", "--out", "run", "--plugin", "renamed_plugin:register")
    assert moved.exit_code == 0, moved.output
    for kind, table, name in (("method", METHODS, "hinge"), ("data set", SOURCES, "noise")):
        table.pop(name)
        gone = fullrank("train", "--resume", "--out", "run", "--plugin", "json")
        assert (gone.exit_code, f"no plugin brings the {kind} '{name}'; name it with --plugin" in gone.stderr) == (
            2,
            True,
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--plugin", "nowhere_to_be_found"), "nowhere_to_be_found cannot be imported: ModuleNotFoundError"),
        (("--plugin", "nowhere_to_be_found"), "; name a module that is installed or lies in /"),
        (("--plugin", ""), "an empty name cannot be imported"),
        (("--plugin", "ends"), "ends cannot be imported: SystemExit: bye\n"),
        (("--plugin", "their_plugin:read"), "their_plugin:read failed: TypeError"),
        (("--plugin", "their_plugin:none"), "their_plugin has no 'none'"),
        (("--method", "hinge"), "--method: 'hinge' is none of simclr"),
        (("--dataset", "noise"), "--dataset: 'noise' is none of fashion"),
        (("--backbone", "tiny"), "unknown architecture 'tiny'"),
    ],
)
def test_what_is_not_there_is_named(elsewhere: Path, flags: tuple[str, ...], message: str) -> None:
    result = fullrank("train", "fashion-simclr", *flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_backbone_that_cannot_be_served_is_refused_before_the_first_step(elsewhere: Path) -> None:
    """Without encoders of the epochs it would be found out after the last one."""
    flags = ("--plugin", "their_plugin:register", "--dataset", "noise", "--backbone", "sums", "--batch-size", "64")
    refused = fullrank("train", "fashion-simclr", *flags, "--keep", "0", "--out", "run")
    assert refused.exit_code == 1
    assert "the backbone has no ONNX graph, and cannot be served without its plugin: " in refused.stderr
    assert not Path("run").exists()


def test_a_backbone_without_a_dimension_is_named(elsewhere: Path) -> None:
    flags = ("--plugin", "their_plugin:register", "--dataset", "noise", "--backbone", "bare", "--out", "run")
    refused = fullrank("train", "fashion-simclr", *flags)
    assert refused.exit_code == 1
    assert "the backbone 'bare' is no module with a whole number `dimension`" in refused.stderr


def test_a_method_without_options_is_refused() -> None:
    class Bare(METHODS["simclr"]):  # type: ignore[misc]
        def __init__(self, encoder: object) -> None:
            pass

    with pytest.raises(PluginError, match="takes no argument `options: A_DATACLASS`"):
        plugins.register_method("bare", Bare)


def test_installed_plugins_are_entry_points(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip leaves it: a folder of metadata beside the module."""
    metadata = elsewhere / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[fullrank.plugins]\ntheirs = their_plugin:register\n")
    monkeypatch.syspath_prepend(elsewhere)
    plugins.load_installed()
    assert "hinge" in METHODS
    assert "noise" in SOURCES


def test_a_flat_folder_of_unlabelled_images_is_a_data_set(elsewhere: Path) -> None:
    generator = np.random.default_rng(0)
    (elsewhere / "photographs" / "more").mkdir(parents=True)
    for i in range(700):
        array = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(array).save(elsewhere / "photographs" / ("more" if i % 2 else ".") / f"{i}.png")
    flags = ("--dataset", "folder", "--data", "photographs", "--image-size", "16", "--backbone", "resnet18")
    flags += ("--width", "4", "--batch-size", "64", "--epochs", "1", "--workers", "0", "--threads", "1")
    done = fullrank("train", "fashion-simclr", *flags, "--out", "run", "--json")
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    assert "knn" not in card["quality"]
    assert card["quality"]["rows"] == 140
    assert card["preprocessing"]["size"] == 16
    assert load_artifact("run/encoder").reference is not None
    assert fullrank("report", "run", "--out", "report.html").exit_code == 0
    evaluated = fullrank("evaluate", "run", "--data", "photographs", "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout).keys() == {"rows"} | Spectrum.of(torch.randn(4, 2)).summary().keys()
    probed = fullrank("evaluate", "run", "--data", "photographs", "--probes")
    assert (probed.exit_code, "these images have no labels to fit a probe to" in probed.stderr) == (1, True)
    for file in (elsewhere / "photographs").rglob("*.png"):
        file.write_bytes(b"not an image")
    unreadable = fullrank("evaluate", "run", "--data", "photographs")
    assert "none of the 700 images can be decoded: is this the folder?" in unreadable.stderr
    (elsewhere / "empty").mkdir()
    empty = fullrank("train", "fashion-simclr", "--dataset", "folder", "--data", "empty", "--out", "other")
    assert "holds no image files" in empty.stderr
