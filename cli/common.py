"""Shared parts of the commands: options, errors and printing."""

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

# Markup is off: names that users give may hold square brackets.
console = Console(markup=False, highlight=False)
errors = Console(stderr=True, markup=False, highlight=False)


def usable(device: str) -> str:
    """A device that torch can compute on. Raises BadParameter."""
    if device != "cpu":
        import torch

        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise typer.BadParameter(f"{device!r} cannot be used here: {reason}; cpu always can") from error
    return device


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of the data set; its usual place if absent.")]
Engine = Annotated[
    Literal["auto", "onnx", "torch"],
    typer.Option(envvar="FULLRANK_ENGINE", help="onnx (onnxruntime, on a CPU) or torch; auto is onnx where it can."),
]
Device = Annotated[str, typer.Option(callback=usable, help="cpu, cuda, cuda:1, ...")]


def fail(message: object, code: int = 1) -> NoReturn:
    errors.print(f"fullrank: {message}", style="red", soft_wrap=True)
    raise typer.Exit(code)


def show(values: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    table = Table("measure", "value", title=title)
    for key, value in values.items():
        table.add_row(key, str(value))
    console.print(table)


def write(path: Path, content: bytes, option: str) -> None:
    """Write a file atomically. If that fails, end the command with an error."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        fail(f"{option}: {error}")
