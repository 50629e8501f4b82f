"""Saves and loads checkpoints, safe against a kill, a full disk or another run in the same folder."""

import io
import json
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import TypeAdapter

from models import files
from training.precision import Precision
from training.recipes import Recipe

AGAIN = "remove it, or name another --out, to begin anew"


class TrainingError(RuntimeError):
    """Raised for a run that cannot start or go on. The message says why and what to do."""


class StoppedError(TrainingError):
    """Raised when a run was asked to stop and has saved its checkpoint."""


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-ready values."""
    described: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=lambda model: model.model_dump()))
    return described


def how(settings: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """What a card says of a run beside its recipe: the command that began it, and its number format."""
    return {"command": settings.get("command", ""), "precision": precision}


def recipe_of(described: dict[str, Any]) -> Recipe:
    """The inverse of `describe`. Fields that an older version did not know get their defaults."""
    return TypeAdapter(Recipe).validate_python(described)


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: a reader finds the old one or the new one, never half of one.

    Raises TrainingError if it cannot be written; the old one is then unchanged.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    kept = "the last one is intact" if path.exists() else "there is none yet"
    _replace(path, buffer.getbuffer(), f"; {kept}. Make room, then --resume")


def refused(path: Path, error: Exception) -> str:
    """In words, why a file cannot be read as a checkpoint."""
    if isinstance(error, OSError):
        return f"{path}: {error.strerror or error}"
    if not zipfile.is_zipfile(path):
        reason = "torch.save did not write it, or not to its end"
    else:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return f"{path} is damaged, or no checkpoint of this version ({reason})"


def read(path: Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """The state in `path`, if every part of the file has its checksum, at which torch does not look.

    On damaged bytes it may raise any exception.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not have its checksum")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device, mmap=mmap)
    return state


def load(path: Path, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Load the state in `path`. Raises TrainingError if it is damaged or of a run by another recipe."""
    try:
        state = read(path, device)
        made_by = describe(recipe_of(json.loads(state["recipe"])))
    except Exception as error:
        raise TrainingError(f"{refused(path, error)}; {AGAIN}") from error
    wanted = describe(recipe)
    if made_by["name"] != wanted["name"]:
        raise TrainingError(f"{path} is a run of {made_by['name']}, not of {wanted['name']}")
    for key in wanted:
        if made_by.get(key) != wanted[key]:
            raise TrainingError(
                f"{path} is a run with {key} = {made_by.get(key)}, not {wanted[key]}; resume with what it began with"
            )
    return state


def began_with(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the run that wrote the checkpoint, and the run's settings. Raises TrainingError as `load` does."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return recipe_of(json.loads(state["recipe"])), settings_of(state)
    except Exception as error:
        raise TrainingError(f"{refused(path, error)}; {AGAIN}") from error


def settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's run. Old ones have none."""
    settings: dict[str, Any] = json.loads(state.get("run", "{}"))
    return settings


def precision_of(state: Mapping[str, Any]) -> Precision:
    """The precision that a checkpoint's run computes in. Old ones do not say: there was no choice."""
    began_in: Precision = state.get("precision", "bfloat16")
    return began_in


def write(path: Path, text: str) -> None:
    """Replace a text file atomically. Raises TrainingError if it cannot be written."""
    _replace(path, text, "; make room, then --resume")


def _replace(path: Path, content: memoryview | str, remedy: str) -> None:
    try:
        files.write(path, content)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}){remedy}") from error


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file. Raises TrainingError if it cannot be written."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}); make room, then --resume") from error


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that a run can save between steps. A second one interrupts."""
    requested = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
