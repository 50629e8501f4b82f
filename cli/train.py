"""fullrank train."""

import json
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.common import AsJson, DataFolder, Device, fail, out_of_memory, printed, usable_folder, usable_name

OPTIMIZERS, GUARDS = ("sgd", "lars", "adamw"), ("warn", "stop", "off")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
STEMS = ("3x3", "3x3/2", "7x7")


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe, DATA-METHOD; see --list.")] = "",
    data: DataFolder = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder: log, checkpoint, encoder/.", show_default="runs/RECIPE")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images.", show_default="the recipe's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images a step, of all processes together.", show_default="the recipe's")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Parts that a batch is cut into, to save memory; see the docs.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The peak, for this batch size.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0.0, help="Strength of the weight decay.", show_default="the recipe's")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, lars or adamw.")] = None,
    clip: Annotated[float | None, typer.Option(min=0.0, help="Largest norm of the gradient.")] = None,
    width: Annotated[int | None, typer.Option(min=1, max=1024, help="Channels of the first stage.")] = None,
    stem: Annotated[str | None, typer.Option(help="First convolution: 3x3, 3x3/2 (stride 2) or 7x7.")] = None,
    backbone: Annotated[str | None, typer.Option(help="resnet18, resnet50, vit_tiny_patch4, ...")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, max=1024, help="Side of the encoder's input.")] = None,
    crop: Annotated[float | None, typer.Option(help="Least share of the image's area that a view keeps.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many training and test images.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=-(2**63), max=2**63 - 1, help="Random seed of weights, order and views.", show_default="the recipe's"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Another method, or a plugin's, in the recipe's place.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another data set: `folder`, a flat folder of images in --data; or a plugin's.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="MODULE[:FUNCTION] that registers what is your own. Repeatable.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the method, e.g. d0=64. Repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the encoder.", show_default="the recipe's")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this encoder's weights.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's checkpoint, if any, with what it began with.")
    ] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Save this often, and after each epoch.")] = 10.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode image files.")] = 8,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    precision: Annotated[
        str, typer.Option(help="auto (what is native to the device), float32, bfloat16 or float16.")
    ] = "auto",
    guard: Annotated[str, typer.Option(help="On collapse: warn, stop or off.")] = "warn",
    guard_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Collapse: total variance below this share of the untrained twin's.")
    ] = 0.1,
    keep: Annotated[int, typer.Option(min=0, help="Encoders kept in OUT/encoders, one an epoch.")] = 1,
    tracker: Annotated[
        list[str] | None, typer.Option(help="MODULE:FUNCTION that starts your tracker; see the docs. Repeatable.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard.")] = False,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics.")] = None,
    as_json: AsJson = False,
    show: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
) -> None:
    """Train an encoder and write it as an artifact that `fullrank serve` takes.

    Example: fullrank train fashion-directclr --epochs 5 --out runs/first
    """
    from training.checkpoint import StoppedError, began_with
    from training.checkpoint import describe as described
    from training.data import DataError
    from training.loop import Run, TrainingError
    from training.loop import train as run_training
    from training.plugins import PluginError, found, load, load_installed
    from training.recipes import RECIPES, describe
    from training.recipes import recipe as find

    began = out / "checkpoint.pt" if out else Path("runs", name or recipe, "checkpoint.pt")
    if show or not (recipe or (resume and out)):
        settings_of = {name: described(find(name)) for name in RECIPES} if as_json else {}
        printed(settings_of, "\n".join(describe(name) for name in RECIPES), as_json)
        raise typer.Exit(0 if show else 2)
    choices = ("optimizer", optimizer, OPTIMIZERS), ("guard", guard, GUARDS), ("stem", stem, STEMS)
    for flag, value, allowed in (*choices, ("precision", precision, PRECISIONS)):
        if value is not None and value not in allowed:
            fail(f"--{flag}: {value!r} is none of {', '.join(allowed)}", 2)
    if name:
        usable_name(name)
    settings: dict[str, Any] = {}
    try:
        load_installed()
        for each in plugin or []:
            load(each)
        if resume and began.is_file():
            chosen, settings = began_with(began)
            if (
                recipe
                and name is None
                and out is not None
                and recipe not in (chosen.name, f"{chosen.data}-{chosen.method}")
            ):
                fail(f"{began} is a run of {chosen.name}, not of {recipe}")
            settings["data"] = Path(settings["data"]) if settings.get("data") else None
            settings |= {key: tuple(settings.get(key, ())) for key in ("plugins", "trackers")}
            for each in () if plugin else settings["plugins"]:
                load(each)
            chosen = replace(chosen, name=name or chosen.name)
        elif not recipe:
            fail(f"--resume: {began} does not exist; name the recipe to begin with", 2)
        else:
            chosen = replace(find(recipe), name=name or recipe)
        chosen = _own(chosen, method, dataset)
        for each in tracker or settings.get("trackers", ()):
            found(each)
    except (ValueError, PluginError) as error:
        fail(error, 2)
    except TrainingError as error:
        fail(error)
    flags: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    flags |= {"weight_decay": weight_decay, "optimizer": optimizer, "clip": clip, "accumulate": accumulate}
    flags |= {"image_size": image_size}
    chosen = replace(chosen, **{key: value for key, value in flags.items() if value is not None})
    chosen = replace(chosen, options=chosen.options | _options(option or []))
    chosen = replace(chosen, architecture=_architecture(chosen, backbone, width, stem))
    if crop is not None:
        chosen = _cropped(chosen, crop)
    usable_folder(began.parent, "--out")
    run = Run(
        out=began.parent,
        data=data,
        limit=limit,
        device=device,
        threads=threads,
        resume=resume,
        init=init,
        command=shlex.join(["fullrank", *sys.argv[1:]]),
        workers=workers,
        compile=compiled,
        precision=precision,  # type: ignore[arg-type]
        checkpoint_minutes=checkpoint_minutes,
        keep=keep,
        guard=guard,  # type: ignore[arg-type]
        guard_share=guard_share,
        tensorboard=tensorboard,
        metrics_port=metrics_port,
        trackers=tuple(tracker or ()),
        plugins=tuple(plugin or ()),
    )
    known = {field.name for field in fields(Run)}  # another version may have written the settings
    run = replace(run, **{key: settings[key] for key in settings.keys() & known if not _was_given(context, key)})
    try:
        artifact = run_training(chosen, run)
    except StoppedError as error:
        fail(error, 130)
    except (DataError, TrainingError, ValueError, OSError) as error:
        fail(error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(f"{run.device} has too little memory for this: lower --batch-size or --width, or cut it with --accumulate")
    if as_json:
        printed(artifact.card.model_dump(mode="json"), "", as_json)


def _own(recipe: Any, method: str | None, dataset: str | None) -> Any:
    """The recipe with another method (and that method's own options) or another data set."""
    from training.data import SOURCES
    from training.methods import METHODS
    from training.plugins import brought

    for flag, value, known in (("method", method, METHODS), ("dataset", dataset, SOURCES)):
        if value is not None and value not in known:
            fail(f"--{flag}: {value!r} is none of {', '.join(known)}", 2)
    if method is not None and method != recipe.method:
        recipe = replace(recipe, method=method, options={})
    recipe = recipe if dataset is None else replace(recipe, data=dataset)
    brought("data set", recipe.data, SOURCES)
    brought("method", recipe.method, METHODS)
    return recipe


def _was_given(context: typer.Context, setting: str) -> bool:
    """Whether a run's setting was given on the command line."""
    source = context.get_parameter_source(
        {"compile": "compiled", "trackers": "tracker", "plugins": "plugin"}.get(setting, setting)
    )
    return source is not None and source.name == "COMMANDLINE"


def _architecture(recipe: Any, backbone: str | None, width: int | None, stem: str | None) -> Any:
    """The recipe's architecture, or the one called `backbone` for the same input, with the given width and stem."""
    from models.artifact import architecture
    from training.data import SOURCES
    from training.plugins import BACKBONES, OwnArchitecture

    shape = {key: value for key, value in {"width": width, "stem": stem}.items() if value is not None}
    preprocessing = SOURCES[recipe.data].sized(recipe.image_size)
    size, channels = preprocessing.size, preprocessing.channels
    if backbone in BACKBONES:
        return OwnArchitecture(name=str(backbone), size=size, in_channels=channels)
    try:
        if backbone is not None:
            return architecture(backbone, size=size, in_channels=channels, **shape)
        fields = type(recipe.architecture).model_fields
        if unknown := ", ".join(f"--{key}" for key in shape if key not in fields):
            fail(f"{unknown}: {recipe.architecture.name}, the encoder of {recipe.name}, has no such thing", 2)
        shape |= {"in_channels": channels} | ({"size": size} if "size" in fields else {})
        return type(recipe.architecture)(**(recipe.architecture.model_dump() | shape))
    except ValueError as error:
        reason = (
            "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
            if hasattr(error, "errors")
            else str(error)
        )
        fail(f"--backbone: {reason}", 2)


def _cropped(recipe: Any, least: float) -> Any:
    """The recipe with both views keeping at least this share of an image's area."""
    if not 0 < least <= 1:
        fail(f"--crop: {least} must lie above 0 and at most at 1", 2)
    first = replace(recipe.augmentation, crop=(least, 1.0))
    second = replace(recipe.second, crop=(least, 1.0)) if recipe.second else None
    return replace(recipe, augmentation=first, second=second)


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            fail(f"--option {pair!r}: write NAME=VALUE, for example d0=64 or predictor=false", 2)
        try:
            options[key] = json.loads(value)
        except ValueError:  # no JSON, or a number of thousands of digits
            options[key] = value
    return options
