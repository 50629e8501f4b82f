"""fullrank export."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, fail, printed, usable_folder


def export(
    encoder: Annotated[Path, typer.Argument(help="An encoder's folder, or the checkpoint.pt of a run.")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="encoder.onnx, a small graph; its weights are encoder.safetensors beside it.")
    ] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="encoder.pt2, for torch.export.load; load only your own.")
    ] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="encoder.json and encoder.safetensors: an encoder without reference.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the encoder's own if absent.")] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="MODULE[:FUNCTION] that registers a checkpoint's own backbone. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an encoder in a form that other tools read: from (n, channels, size, size) uint8 pixels to rows.

    What is written is read back and compared with the encoder first; it must agree within 1e-4.

    Example: fullrank export models/pretrained/fashion-directclr --onnx --out exported
    """
    from models.artifact import ArtifactError, load
    from models.exporting import FORMS, ExportError
    from training.checkpoint import TrainingError
    from training.export import servable
    from training.plugins import PluginError, load_installed
    from training.plugins import load as load_plugin
    from training.saved import artifact_of

    chosen = [name for name, flag in zip(FORMS, (onnx, torch_export, safetensors), strict=True) if flag]
    if not chosen:
        fail("choose what to write: " + ", ".join(f"--{name}" for name in FORMS), 2)
    if out is None and (safetensors or encoder.is_file()):
        fail("--out: name the folder to write to", 2)
    if out is not None:
        usable_folder(out, "--out")
    try:
        load_installed()
        for each in plugin or []:
            load_plugin(each)
        artifact = artifact_of(encoder) if encoder.is_file() else load(encoder)
        # This form first: it writes the whole folder at once, and replaces an older one.
        forms = sorted(chosen, key="safetensors".__ne__)
        written = [(name, servable(artifact) if name == "safetensors" else artifact) for name in forms]
        paths = [str(path) for name, form in written for path in FORMS[name](form, out or encoder)]
    except (ArtifactError, ExportError, PluginError, TrainingError, OSError) as error:
        fail(error)
    printed({"files": paths}, "\n".join(paths), as_json)
