"""fullrank evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, DataFolder, Device, Engine, fail, out_of_memory, show


def evaluate(
    encoder: Annotated[
        Path, typer.Argument(help="An encoder's folder, a run's folder, or `pixels` for the raw-pixel baseline.")
    ],
    data: DataFolder = None,
    dataset: Annotated[
        str | None, typer.Option(help="A data set by name.", show_default="what the encoder was trained on")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Linear probes too, on all, 10 % and 1 % of labels.")
    ] = False,
    protocol: Annotated[
        bool, typer.Option("--sgd", help="The papers' SGD protocols too: linear evaluation, fine-tuning on few labels.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of --sgd.", show_default="the papers'")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of --sgd: auto (native to the device), float32, bfloat16 or float16.", show_default="auto"),
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="MODULE[:FUNCTION] that registers a data set of your own. Repeatable.")
    ] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure an encoder on a test set: weighted kNN (k = 20, temperature 0.07), its spectrum, and probes if asked.

    Example: fullrank evaluate models/pretrained/fashion-directclr
    """
    import torch

    from models.artifact import ArtifactError, load
    from training import evaluate as room
    from training.data import SOURCES, DataError, load_data
    from training.finetune import sgd_table
    from training.plugins import PluginError, load_installed
    from training.plugins import load as load_plugin
    from training.precision import choose

    if protocol and str(encoder) == "pixels":
        fail("--sgd: pixels have no encoder to fine-tune; --probes measures them", 2)
    if precision and not protocol:
        fail("--precision: only --sgd trains; add it", 2)
    if epochs and not protocol:
        fail("--epochs: only --sgd trains for epochs; add it", 2)
    try:
        load_installed()
        for each in plugin or []:
            load_plugin(each)
        if protocol:
            choose(precision or "auto", torch.device(device))  # type: ignore[arg-type]
        folder = _folder(encoder)
        artifact = None if str(encoder) == "pixels" else load(folder)
        trained_on = artifact.card.training.get("data") if artifact else "fashion"
        source = dataset or trained_on
        if source not in SOURCES:
            fail(f"--dataset: name one of {', '.join(SOURCES)}; the encoder's card says {trained_on!r}", 2)
        train_set, test_set = load_data(source, data)
        quality = (
            room.evaluate(artifact, train_set, test_set, device, probes, engine)
            if artifact
            else room.evaluate_pixels(train_set, test_set, probes)
        )
        if artifact and protocol:
            quality |= sgd_table(artifact, train_set, test_set, device, epochs, precision or "auto")  # type: ignore[arg-type]
    except (ArtifactError, DataError, PluginError, ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(f"{device} has too little memory for this; name another --device, such as cpu")
    show(quality, f"{encoder} on {source}", as_json)


def _folder(named: Path) -> Path:
    """The encoder's folder in a run's folder (the last epoch's if the run has not ended); else the folder itself."""
    from training.export import epochs_in

    if (named / "encoder" / "encoder.json").is_file():
        return named / "encoder"
    epochs = [folder for folder in epochs_in(named / "encoders") if (folder / "encoder.json").is_file()]
    return epochs[-1] if epochs else named
