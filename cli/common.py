"""Shared parts of the commands: options, errors and printing."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

# Markup is off: names that users give may hold square brackets.
console = Console(markup=False, highlight=False)
errors = Console(stderr=True, markup=False, highlight=False)


def unusable(device: str) -> str | None:
    """Why torch cannot compute on a device; None if it can."""
    if device == "cpu":
        return None
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        return f"{device!r} cannot be used here: {reason}; cpu always can"
    return None


def usable(device: str) -> str:
    """A device that torch can compute on. Raises BadParameter."""
    if reason := unusable(device):
        raise typer.BadParameter(reason)
    return device


LONGEST_ERROR = 4000
EXIT_CODES = {
    0: "done",
    1: "it failed, or an encoder was refused",
    2: "the command was not understood",
    130: "interrupted",
}
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of the data set; its usual place if absent.")]
Engine = Annotated[
    Literal["auto", "onnx", "torch"],
    typer.Option(envvar="FULLRANK_ENGINE", help="onnx (onnxruntime, on a CPU) or torch; auto is onnx where it can."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"],
    typer.Option(envvar="FULLRANK_DTYPE", help="Precision of the forward pass. bfloat16 runs in the torch engine."),
]
Device = Annotated[str, typer.Option(callback=usable, help="cpu, cuda, cuda:1, ...")]


def fail(message: object, code: int = 1) -> NoReturn:
    complain(message)
    raise typer.Exit(code)


def complain(message: object) -> None:
    """Print an error."""
    errors.print(f"fullrank: {shown(message)}", style="red", soft_wrap=True)


def plain_warnings() -> None:
    """Print our own warnings as a sentence, without the file and the line of code that they come from."""
    usual = warnings.formatwarning

    def sentence(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning:
            return f"fullrank: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = sentence


def shown(message: object) -> str:
    """An error for a terminal. Names in it may be a stranger's: control characters are escaped, and it has an end."""
    text = worded(message)
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]}... ({len(text)} characters)"
    return "".join(it if it.isprintable() or it == "\n" else repr(it)[1:-1] for it in text)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no memory left. For a CPU torch has no type of its own of error."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def worded(message: object) -> str:
    """What an error says, or its type where it says nothing.

    Of one of the operating system that is the file and the reason, without its number.
    """
    if isinstance(message, OSError) and message.strerror:
        return f"{message.filename}: {message.strerror}" if message.filename else message.strerror
    return str(message) or type(message).__name__


def usable_folder(path: Path, option: str) -> None:
    """End the command, before any work, if `path` or what it lies in is a file, or a folder that is read-only."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        fail(f"{option}: {there} is a file; name a folder", 2)
    _writable(there, option)


def _writable(folder: Path, option: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        fail(f"{option}: {folder} is read-only here; name another place", 2)


def usable_name(name: str) -> None:
    """End the command, before any work, if an encoder cannot be called so."""
    from models.card import NAME

    if not re.fullmatch(NAME, name):
        fail(
            f"--name: {name!r} must be 1 to 64 letters, digits, '.', '_' and '-', and begin with one of the first two",
            2,
        )


def printed(values: Any, text: str, as_json: bool) -> None:
    """Print a result on standard output: as JSON, in which NaN is null, or as text."""
    from fullrank.monitor.snapshot import to_json

    typer.echo(json.dumps(to_json(values), indent=2) if as_json else text)


def show(values: dict[str, Any], title: str, as_json: bool) -> None:
    """Print a result: as JSON, or as a table of two columns."""
    if as_json:
        printed(values, "", as_json)
        return
    table = Table("measure", "value", title=title)
    for key, value in values.items():
        table.add_row(key, str(value))
    console.print(table)


def usable_output(path: Path, option: str) -> None:
    """End the command, before any work, if a file cannot be written at `path`."""
    if path.is_dir():
        fail(f"{option}: {path} is a folder; name a file", 2)
    if not path.absolute().parent.is_dir():
        fail(f"{option}: {path.absolute().parent} is not a folder; make it first", 2)
    if path.is_file() or not path.exists():  # else a device, such as /dev/stdout
        _writable(path.absolute().parent, option)


def write(path: Path, content: bytes, option: str) -> None:
    """Write a file atomically. If that fails, end the command with an error."""
    from models.files import write as write_file

    try:
        write_file(path, content)
    except OSError as error:
        fail(f"{option}: {worded(error)}")
