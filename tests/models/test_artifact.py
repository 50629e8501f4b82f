"""An artifact survives the disk exactly, and is refused, with the reason, when anything in it disagrees."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.artifact import CARD, REFERENCE, WEIGHTS, ArtifactError, EncoderCard, load, save


@pytest.fixture
def folder(small_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_artifact, tmp_path / "copy"))


def edit_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights and make the card vouch for them, as a careless exporter would."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    files = json.loads((folder / CARD).read_text())["files"]
    edit_card(folder, files=files | {WEIGHTS: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()})


def test_a_round_trip_keeps_every_bit(small_artifact: Path, tmp_path: Path) -> None:
    first = load(small_artifact)
    saved = save(first, tmp_path / "again")
    second = load(tmp_path / "again")
    assert second.card == first.card == saved.card
    for name, tensor in first.encoder.state_dict().items():
        assert torch.equal(tensor, second.encoder.state_dict()[name])
    assert first.reference is not None
    assert second.reference is not None
    for name, tensor in first.reference.tensors().items():
        assert torch.equal(tensor, second.reference.tensors()[name])
    assert first.canary is not None
    assert second.canary is not None
    assert torch.equal(first.canary.images, second.canary.images)
    assert second.canary.licence == "MIT"


@pytest.mark.parametrize("name", [CARD, WEIGHTS, REFERENCE])
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read: Is a directory"):
        load(folder)


def test_other_weights_have_another_revision(folder: Path) -> None:
    before = load(folder).card.revision
    assert len(before) == 12
    rewrite_weights(folder, lambda weights: weights["conv1.weight"].add_(1e-6))
    card = EncoderCard.model_validate_json((folder / CARD).read_bytes())
    assert card.revision != before
    with pytest.raises(ArtifactError, match="an encoder of other weights"):  # the reference stayed that of the old ones
        load(folder)


@pytest.mark.parametrize("version", [1, 2])
def test_another_preprocessing_has_another_revision(folder: Path, version: int) -> None:
    edit_card(folder, schema_version=version)
    before = EncoderCard.model_validate_json((folder / CARD).read_bytes())
    for changed in ({"resize": "crop"}, {"mean": [0.4]}, {"size": 32}, {"draft": 0}):
        edit_card(folder, preprocessing=before.preprocessing.model_dump(mode="json") | changed)
        card = EncoderCard.model_validate_json((folder / CARD).read_bytes())
        assert card.revision != before.revision, changed
        assert not card.is_of(before.identity)
        with pytest.raises(ArtifactError, match="architecture or preprocessing"):
            load(folder)
    assert load(folder, referenced=False).reference is None


def test_what_the_first_version_wrote_of_an_encoder_is_still_taken(folder: Path) -> None:
    """It called an encoder by its weights alone."""
    edit_card(folder, schema_version=1)
    card = EncoderCard.model_validate_json((folder / CARD).read_bytes())
    weights = card.files[WEIGHTS]
    tensors = load_file(folder / REFERENCE)
    tensors["encoder.sha256"] = torch.tensor(list(bytes.fromhex(weights)), dtype=torch.uint8)
    save_file(tensors, folder / REFERENCE)
    edit_card(folder, files=card.files | {REFERENCE: hashlib.sha256((folder / REFERENCE).read_bytes()).hexdigest()})
    assert load(folder).reference is not None
    assert card.is_of(weights[:12])
    edit_card(folder, schema_version=2)
    assert not EncoderCard.model_validate_json((folder / CARD).read_bytes()).is_of(weights[:12])


def test_saving_over_an_artifact_replaces_it_and_over_anything_else_refuses(folder: Path, tmp_path: Path) -> None:
    artifact = load(folder)
    save(artifact, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, WEIGHTS, REFERENCE]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an encoder artifact"):
        save(artifact, mine)
    assert (mine / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


def test_what_lies_beside_an_artifact_stays_with_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    artifact = load(folder)
    (folder / "log.jsonl").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    save(replace(artifact, reference=None, canary=None), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CARD, WEIGHTS, "log.jsonl", "notes"]
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    with torch.no_grad():
        artifact.encoder.get_parameter("conv1.weight").add_(1)
    save(artifact, folder)  # another encoder: the log is not its own
    assert sorted(path.name for path in folder.iterdir()) == [CARD, WEIGHTS, REFERENCE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_an_encoder_without_a_reference_loads(folder: Path) -> None:
    (folder / REFERENCE).unlink()
    files = json.loads((folder / CARD).read_text())["files"]
    edit_card(folder, files={WEIGHTS: files[WEIGHTS]})
    artifact = load(folder)
    assert artifact.reference is None
    assert artifact.canary is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip_a_bit(f / WEIGHTS), r"encoder\.safetensors: its SHA-256"),
        (lambda f: flip_a_bit(f / REFERENCE), r"reference\.safetensors: its SHA-256"),
        (lambda f: (f / WEIGHTS).unlink(), r"encoder\.safetensors: missing"),
        (lambda f: (f / REFERENCE).unlink(), r"reference\.safetensors: missing"),
        (lambda f: (f / CARD).unlink(), r"encoder\.json: missing"),
        (lambda f: (f / CARD).write_text("{"), r"encoder\.json: content: Invalid JSON"),
        (lambda f: edit_card(f, schema_version=3), r"encoder\.json: schema_version"),
        (lambda f: edit_card(f, dimension=31), "dimension is 31, but this architecture has 32"),
        (lambda f: edit_card(f, surprise=1), r"encoder\.json: surprise"),
        (lambda f: edit_card(f, name="../etc"), r"encoder\.json: name"),
        (lambda f: rewrite_weights(f, lambda w: w.pop("bn1.bias")), "missing, first 'bn1.bias'"),
        (lambda f: rewrite_weights(f, lambda w: w.update(x=torch.ones(1))), "unexpected tensor.*'x'"),
        (
            lambda f: rewrite_weights(f, lambda w: w.update({"bn1.bias": torch.ones(5)})),
            r"'bn1.bias' is torch.float32 \(5,\), not torch.float32 \(4,\)",
        ),
        (
            lambda f: rewrite_weights(f, lambda w: w.update({"bn1.bias": torch.ones(4).half()})),
            "'bn1.bias' is torch.float16",
        ),
        (lambda f: rewrite_weights(f, lambda w: w["bn1.bias"].fill_(float("nan"))), "'bn1.bias' holds values"),
    ],
)
def test_damage_is_refused_with_the_file_and_the_reason(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_loading_never_unpickles(folder: Path) -> None:
    """A pickle under the weights' name is refused by its hash, and, vouched for, by its format."""
    torch.save({"conv1.weight": torch.ones(1)}, folder / WEIGHTS)
    files = json.loads((folder / CARD).read_text())["files"]
    edit_card(folder, files=files | {WEIGHTS: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()})
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load(folder)


def test_a_place_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="x: cannot be read: File name too long"):
        load(tmp_path / ("x" * 300))
