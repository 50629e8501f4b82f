"""fullrank train."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.common import AsJson, DataFolder, Device, fail

OPTIMIZERS, GUARDS = ("sgd", "lars", "adamw"), ("warn", "stop", "off")


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, DATA-METHOD; see --list.")] = "",
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Run folder: log, checkpoint, encoder/. [runs/RECIPE]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=2)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The peak, for this batch size.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0.0)] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, lars or adamw.")] = None,
    clip: Annotated[float | None, typer.Option(min=0.0, help="Largest norm of the gradient.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many training images.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the method, e.g. d0=64. Repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the encoder. [the recipe's]")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [torch's choice]")] = None,
    init: Annotated[Path | None, typer.Option(help="Start from this encoder's weights.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint, if any.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.0, help="Save this often, and after each epoch.")] = 10.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode image files.")] = 8,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
    guard: Annotated[str, typer.Option(help="On collapse: warn, stop or off.")] = "warn",
    guard_share: Annotated[float, typer.Option(help="Collapse: effective rank below this share of its best.")] = 0.5,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write OUT/tensorboard.")] = False,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics.")] = None,
    as_json: AsJson = False,
    show: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
) -> None:
    """Train an encoder and write it as an artifact that `fullrank serve` takes.

    Example: fullrank train fashion-directclr --epochs 5 --out runs/first
    """
    from training.checkpoint import StoppedError
    from training.data import DataError
    from training.loop import Run, TrainingError
    from training.loop import train as run_training
    from training.recipes import RECIPES, describe
    from training.recipes import recipe as find

    if show or not recipe:
        typer.echo("\n".join(describe(name) for name in RECIPES))
        raise typer.Exit(0 if show else 2)
    try:
        chosen = find(recipe)
    except ValueError as error:
        fail(error, 2)
    for flag, value, allowed in (("optimizer", optimizer, OPTIMIZERS), ("guard", guard, GUARDS)):
        if value is not None and value not in allowed:
            fail(f"--{flag}: {value!r} is none of {', '.join(allowed)}", 2)
    flags: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    flags |= {"weight_decay": weight_decay, "optimizer": optimizer, "clip": clip}
    chosen = replace(chosen, **{key: value for key, value in flags.items() if value is not None})
    chosen = replace(chosen, name=name or recipe, options=chosen.options | _options(option or []))
    run = Run(
        out=out or Path("runs", chosen.name),
        data=data,
        limit=limit,
        device=device,
        threads=threads,
        resume=resume,
        init=init,
        command=shlex.join(["fullrank", *sys.argv[1:]]),
        workers=workers,
        compile=compiled,
        checkpoint_minutes=checkpoint_minutes,
        guard=guard,  # type: ignore[arg-type]
        guard_share=guard_share,
        tensorboard=tensorboard,
        metrics_port=metrics_port,
    )
    try:
        artifact = run_training(chosen, run)
    except StoppedError as error:
        fail(error, 130)
    except (DataError, TrainingError, ValueError, OSError) as error:
        fail(error)
    if as_json:
        typer.echo(artifact.card.model_dump_json(indent=2))


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            fail(f"--option {pair!r}: write NAME=VALUE, for example d0=64 or predictor=false", 2)
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options
