"""`fullrank check` and `fullrank reference`: the deploy gate, and what an imported encoder needs to be watched."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cli import app
from models import gate
from models.artifact import ArtifactError, load, save
from models.embedder import Embedder, normalize
from service.settings import PRETRAINED


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def named(name: str, folder: Path, artifact_folder: Path, change: Callable[[torch.nn.Module], None]) -> Path:
    """A changed encoder, saved with the reference and canary of before."""
    artifact = load(artifact_folder)
    with torch.no_grad():
        change(artifact.encoder)
    save(replace(artifact, card=artifact.card.model_copy(update={"name": name})), folder / name)
    return folder / name


def squash(encoder: torch.nn.Module) -> None:
    last = encoder.get_submodule("layer4.1.bn2")
    last.weight.mul_(1e-3)  # type: ignore[operator, union-attr]
    last.bias.fill_(50.0)  # type: ignore[operator, union-attr]


def cases(report: Path) -> dict[str | None, str | None]:
    """test case -> the failure's message, or None."""
    found = ElementTree.parse(report).getroot().findall("testsuite/testcase")
    return {it.get("name"): None if (f := it.find("failure")) is None else f.get("message") for it in found}


def test_a_healthy_encoder_passes_with_a_green_report(small_artifact: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    result = run("check", small_artifact, "--against", small_artifact, "--junit", report, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["passed"] is True
    assert set(cases(report).values()) == {None}
    assert {"canary", "participation_ratio", "alive_fraction"} <= cases(report).keys()


def test_a_collapsed_encoder_fails_with_the_directions_that_died(small_artifact: Path, tmp_path: Path) -> None:
    squashed, report = named("squashed", tmp_path, small_artifact, squash), tmp_path / "report.xml"
    result = run("check", squashed, "--against", small_artifact, "--junit", report)
    assert result.exit_code == 1
    assert "FAIL  squashed:" in result.stdout
    assert "directions 1 to 32 hold" in result.stdout
    assert "total variance" in str(cases(report)["total_variance"])


@pytest.mark.parametrize("damage", ["bytes", "missing"])
def test_what_cannot_be_read_fails_with_a_report_too(small_artifact: Path, tmp_path: Path, damage: str) -> None:
    folder = named("damaged", tmp_path, small_artifact, lambda _: None)
    weights, report = folder / "encoder.safetensors", tmp_path / "report.xml"
    if damage == "bytes":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    else:
        weights.unlink()
    result = run("check", folder, "--junit", report)
    assert result.exit_code == 1
    assert "encoder.safetensors" in result.stderr
    assert "encoder.safetensors" in str(cases(report)["load"])
    assert json.loads(run("check", folder, "--json").stdout)["passed"] is False
    assert run("check", folder, "--nonsense").exit_code == 2


def test_a_name_that_no_xml_may_hold_is_escaped_in_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert run("check", tmp_path / "no\x01thing\udcff", "--junit", report).exit_code == 1
    assert rf"{tmp_path}/no\x01thing\udcff is not a folder" in str(cases(report)["load"])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 160 real images in sub-folders, and three files that are none."""
    from training.data import SAMPLE, read_fashion_mnist

    folder = tmp_path_factory.mktemp("photographs")
    images = read_fashion_mnist(SAMPLE, "train").images
    for i in range(160):
        path = folder / str(i % 3) / f"{i}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(path)
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image, and not taken for one")
    return folder


@pytest.fixture(scope="module")
def imported(small_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a reference."""
    folder = tmp_path_factory.mktemp("imported") / "imported"
    save(replace(load(small_artifact), reference=None, canary=None), folder)
    return folder


def test_a_folder_of_images_gives_a_reference(imported: Path, photographs: Path, tmp_path: Path) -> None:
    result = run("reference", imported, "--data", photographs, "--out", tmp_path / "with", "--json")
    assert result.exit_code == 0, result.output
    assert "2 files skipped" in result.stderr
    assert "broken.png" in result.stderr
    made, bare = load(tmp_path / "with"), load(imported)
    assert bare.reference is None
    assert made.card.revision == bare.card.revision
    assert made.reference is not None
    assert made.canary is not None
    assert json.loads(result.stdout)["rows"] == made.reference.rows == 80
    assert made.canary.licence == "CC0-1.0 (synthetic)"
    rows = normalize(Embedder(bare).embed(made.canary.images))
    torch.testing.assert_close(made.canary.embeddings, rows, rtol=0, atol=1e-5)
    every = Embedder(bare).embed_files(sorted(photographs.glob("*/*")))
    variance = normalize(every.double()).var(dim=0).sum()
    assert made.reference.total_variance == pytest.approx(float(variance), rel=0.2)
    again = tmp_path / "again"
    run("reference", imported, "--data", photographs, "--out", again)
    assert torch.equal(load(again).reference.basis, made.reference.basis)  # type: ignore[union-attr]


def test_a_data_set_gives_a_calibrated_reference_and_a_folder_the_canary(
    imported: Path, photographs: Path, tmp_path: Path
) -> None:
    from training.data import SAMPLE

    copy = tmp_path / "copy"
    save(load(imported), copy)
    canary = ("--canary", photographs, "--licence", "MIT")
    result = run("reference", copy, "--dataset", "fashion", "--data", SAMPLE, *canary, "--json")
    assert result.exit_code == 0, result.output
    made = load(copy)
    assert made.canary is not None
    assert (made.canary.licence, len(made.canary.images)) == ("MIT", 160)
    assert json.loads(result.stdout)["rows"] == 500
    assert run("reference", copy, "--data", photographs).exit_code == 2
    assert run("reference", copy, "--data", photographs, "--replace").exit_code == 0
    assert run("check", copy).exit_code == 0


@pytest.mark.parametrize(
    ("candidate", "incumbent", "taken"),
    [
        (
            "fashion-byol",
            "cifar10-byol",
            "32 x 32 pixels in colour, which fashion-byol takes at 28 x 28 pixels in grey",
        ),
        (
            "cifar10-byol",
            "fashion-byol",
            "28 x 28 pixels in grey, which cifar10-byol takes at 32 x 32 pixels in colour",
        ),
    ],
)
def test_a_comparison_of_two_kinds_of_input_says_what_is_compared(candidate: str, incumbent: str, taken: str) -> None:
    said = run("check", PRETRAINED / candidate, "--against", PRETRAINED / incumbent)
    assert said.exit_code == 0
    assert f"judged beside {incumbent} on its 256 canary images, {taken}\n" in said.output


def test_an_incumbent_without_canary_images_is_said_to_be_none(small_artifact: Path, imported: Path) -> None:
    alone = run("check", small_artifact)
    assert alone.output.endswith("judged by fixed floors on its own 64 canary images\n")
    beside = run("check", small_artifact, "--against", imported)
    assert beside.output == alone.output.replace(" images\n", f" images, since {load(imported).card.name} has none\n")
    same = run("check", small_artifact, "--against", small_artifact)
    assert same.output.endswith(" on its 64 canary images\n")


def test_an_edited_preprocessing_needs_a_reference_of_its_own(
    small_artifact: Path, photographs: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    save(load(small_artifact), copy)
    card = json.loads((copy / "encoder.json").read_text())
    card["preprocessing"]["resize"] = "crop"
    (copy / "encoder.json").write_text(json.dumps(card))
    refused = run("check", copy)
    assert refused.exit_code == 1
    assert f"fullrank reference {copy} --replace --data DIR" in refused.stderr
    assert run("reference", copy, "--data", photographs, "--replace").exit_code == 0
    assert run("check", copy).exit_code == 0


def test_a_precision_is_judged_by_the_canary_beside_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PRETRAINED / "cifar10-directclr"
    artifact = load(encoder)
    assert artifact.canary is not None
    images = artifact.canary.images[:32]
    exact, reduced = (
        normalize(Embedder(artifact, dtype=dtype).embed(images).double()) for dtype in (torch.float32, torch.bfloat16)
    )
    least = float((exact * reduced).sum(1).min())
    assert run("check", encoder, "--dtype", "bfloat16").exit_code == 0
    monkeypatch.setattr(gate, "PARITY_COSINE", least + 1e-6)
    refused = run("check", encoder, "--dtype", "bfloat16")
    assert refused.exit_code == 1
    assert f"in bfloat16 its canary images give embeddings of cosine {least:.6f}" in " ".join(refused.stderr.split())
    assert run("check", encoder).exit_code == 0


def test_a_reference_in_a_precision_too_coarse_for_the_encoder_is_refused(
    imported: Path, photographs: Path, tmp_path: Path
) -> None:
    """This one, with random weights, keeps the cosine 0.9999 on three synthetic images and not on all."""
    out = tmp_path / "with"
    refused = run("reference", imported, "--data", photographs, "--out", out, "--dtype", "bfloat16")
    assert refused.exit_code == 1
    assert "small: in bfloat16 its canary images give embeddings of cosine 0.9998" in " ".join(refused.stderr.split())
    assert not out.exists()


MISTAKES: dict[str, tuple[tuple[object, ...], int, str]] = {
    "no data": ((), 2, "give a folder of image files"),
    "unknown data set": (("--dataset", "imagnet"), 2, "is none of"),
    "no such folder": (("--data", "nowhere"), 1, "nowhere is not a folder"),
    "unknown dtype": (("--data", "FOLDER", "--dtype", "int8"), 2, "Invalid value for '--dtype'"),
    "no such canary": (("--data", "FOLDER", "--canary", "nowhere"), 1, "nowhere is not a folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(imported: Path, photographs: Path, case: str) -> None:
    arguments, code, message = MISTAKES[case]
    given = (photographs if argument == "FOLDER" else argument for argument in arguments)
    result = run("reference", imported, *given)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_too_few_images_say_how_many_are_needed(imported: Path, photographs: Path, tmp_path: Path) -> None:
    result = run("reference", imported, "--data", photographs / "0")
    assert result.exit_code == 1
    assert "give at least 128" in result.stderr
    for index in range(128):
        (tmp_path / f"{index}.png").write_bytes(b"")
    assert "none of the images could be read" in run("reference", imported, "--data", tmp_path).stderr
    few = run("reference", imported, "--data", photographs, "--canary", photographs / "0")
    assert "a canary needs at least 64" in few.stderr


def test_a_reference_of_other_weights_is_refused(small_artifact: Path, tmp_path: Path) -> None:
    other = named("other", tmp_path, small_artifact, lambda encoder: squash(encoder))
    healthy = load(small_artifact)
    save(healthy, tmp_path / "healthy")
    stolen = (tmp_path / "healthy" / "reference.safetensors").read_bytes()
    save(replace(load(other), reference=None, canary=None), tmp_path / "victim")
    (tmp_path / "victim" / "reference.safetensors").write_bytes(stolen)
    card = json.loads((tmp_path / "victim" / "encoder.json").read_text())
    assert load(tmp_path / "victim").reference is None  # a file that the card does not list is not read
    card["files"]["reference.safetensors"] = hashlib.sha256(stolen).hexdigest()
    (tmp_path / "victim" / "encoder.json").write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="measured on an encoder of other weights"):
        load(tmp_path / "victim")
