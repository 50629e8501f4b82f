"""fullrank import."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.common import AsJson, errors, fail, printed, usable_folder, usable_name

if TYPE_CHECKING:
    from models.artifact import Artifact
    from models.importers import Report


def import_(
    source: Annotated[Path, typer.Argument(help="A checkpoint file, a folder that holds one, or an .onnx file.")],
    family: Annotated[str, typer.Option(help="auto, or the library it comes from, such as timm.")] = "auto",
    pool: Annotated[
        str | None, typer.Option(help="cls, mean, cls+mean or attention.", show_default="the family's")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="online or ema, where a checkpoint has both.")] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="timm's config.json, preprocessor_config.json or open_clip_config.json.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: what the weights do not say. Repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of image files: build a reference and a canary.")] = None,
    limit: Annotated[int, typer.Option(min=128, help="Use at most so many images of --data.")] = 40_000,
    name: Annotated[str | None, typer.Option(help="Name of the encoder.", show_default="the source's")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights.", show_default="what a model card beside them says")
    ] = None,
    nested_dimensions: Annotated[
        str | None,
        typer.Option(
            help="Shorter lengths that its training included (Matryoshka), such as 64,128: /v1/embeddings then takes "
            "`dimensions`."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="./NAME")] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave out objects that are neither tensors nor containers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn another library's checkpoint or ONNX file into an encoder that can be served and watched.

    Nothing in the file is run. Every tensor has its place or is named as left out; else nothing is written.

    Example: fullrank import dino_vits16.pth --family dino --data photographs/ --name dino-small
    """
    from models.artifact import ArtifactError, save
    from models.engines import EngineError
    from models.importers import ImportRefusedError, Options, import_encoder

    if weights not in (None, "online", "ema"):
        fail(f"--weights: {weights!r} is neither online nor ema", 2)
    if name:
        usable_name(name)
    lengths = _lengths(nested_dimensions or "")
    options = Options(family, weights, pool, preprocess, _settings(setting or []), name, licence, strip, lengths)  # type: ignore[arg-type]
    try:
        artifact, report = import_encoder(source, options)
        target = out or Path(artifact.card.name)
        if target.resolve() == source.resolve():
            fail(f"--out: {target} is the source itself; give another folder", 2)
        if target.exists() and not (target / "encoder.json").is_file():
            fail(f"--out: {target} exists and is no encoder; give another folder", 2)
        usable_folder(target, "--out")
        skipped: list[str] = []
        if data is not None:
            artifact, skipped = _with_reference(artifact, data, limit)
        saved = save(artifact, target)
    except (ImportRefusedError, ArtifactError, EngineError) as error:
        fail(error)
    except ValueError as error:
        fail(f"--data: {error}" if data is not None else error)
    except OSError as error:
        fail(error)
    if skipped:
        errors.print(f"{len(skipped)} files skipped, first {skipped[0]}", highlight=False, soft_wrap=True)
    result = {"encoder": str(target), "revision": saved.card.revision} | report.as_json()
    result["reference"] = _about(saved) if saved.reference is not None else None
    if as_json:
        printed(result, "", as_json)
    else:
        _show(saved, report, target)


def _settings(pairs: list[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            fail(f"--set {pair!r}: write KEY=VALUE, for example heads=12", 2)
        settings[key] = value
    return settings


def _lengths(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        fail(f"--nested-dimensions: write whole numbers with commas, for example 64,128,256, and not {text!r}", 2)
    return tuple(map(int, parts))


def _with_reference(artifact: "Artifact", data: Path, limit: int) -> "tuple[Artifact, list[str]]":
    """Add a reference of the images in `data` and a synthetic canary. Also returns the files that were unreadable."""
    from models.references import SYNTHETIC, ImageFolder, enough, from_images, synthetic_canary
    from training.progress import stages

    preprocessing = artifact.card.preprocessing
    images = ImageFolder.of(data, limit)
    enough(len(images), artifact.card.dimension)
    canary = synthetic_canary(preprocessing)
    with stages(errors, embedding=len(images)) as progress:
        done = from_images(artifact, images.pixels(preprocessing), canary, SYNTHETIC, progress=progress)
    return done, images.skipped


def _about(artifact: "Artifact") -> dict[str, Any]:
    reference = artifact.reference
    assert reference is not None
    return {
        "rows": reference.rows,
        "participation_ratio": reference.participation_ratio,
        "effective_rank": reference.effective_rank,
        "calibrated": reference.calibration is not None,
    }


def _show(artifact: "Artifact", report: "Report", target: Path) -> None:
    table = Table(
        show_header=False, title=f"{target}: {report.architecture} from {report.family}", title_justify="left"
    )
    table.add_row(
        "weights", f"{report.file}, SHA-256 {report.sha256[:12]}..." + f" ({report.weights})" * bool(report.weights)
    )
    table.add_row("licence", report.licence or "not stated; say it with --licence")
    table.add_row("kept", f"{report.kept} tensors, {report.parameters:,} parameters, {report.dimension} dimensions")
    for reason, entry in report.dropped.items():
        table.add_row("dropped", f"{entry['count']} tensors: {reason} ({entry['first']})")
    for kind in report.left_out[:5]:
        table.add_row("left out", f"objects of type {kind}")
    if artifact.card.nested_dimensions:
        table.add_row(
            "nested", f"the first {', '.join(map(str, artifact.card.nested_dimensions))} dimensions, as you say"
        )
    table.add_row("preprocessing", f"{report.preprocessing}; from {report.preprocessing_from}")
    for key, value in report.assumed.items():
        hint = "" if "--" in value or "," in value else f" (--set {key}=...)"
        table.add_row("assumed", f"{key}: {value}{hint}")
    if artifact.reference is not None:
        about = _about(artifact)
        calibrated = "calibrated" if about["calibrated"] else "too few images to calibrate thresholds: general ones"
        table.add_row(
            "reference", f"{about['rows']} images, participation ratio {about['participation_ratio']:.3g}, {calibrated}"
        )
    else:
        table.add_row("reference", "none yet: fullrank reference " + str(target) + " --data DIR, or import with --data")
    Console().print(table)
