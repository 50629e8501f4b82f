"""Plugins: methods, backbones, data sets and trackers from modules outside this project.

A plugin is a module that calls `register_method`, `register_backbone` or `register_data` when it is imported, or a
function that does so when it is called. `fullrank train --plugin MODULE[:FUNCTION]` loads one. An installed
distribution names its plugin as an entry point of the group `fullrank.plugins`.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from models.backbones import Encoder
from models.preprocess import Strict
from training.data.sources import SOURCES, Source
from training.methods import METHODS, Method, options_class

T = TypeVar("T")
GROUP = "fullrank.plugins"
BACKBONES: dict[str, Callable[[int, int], Encoder]] = {}


class PluginError(ValueError):
    """Raised for a plugin that cannot be imported or is no plugin. The message says why."""


def register_method(name: str, method: type[Method]) -> None:
    """Register a method for `--method NAME`. Raises PluginError unless its constructor takes `options`, a dataclass."""
    try:
        options_class(method)
    except KeyError as error:
        raise PluginError(f"method {name!r}: its constructor takes no argument `options: A_DATACLASS`") from error
    METHODS[name] = method


def register_data(name: str, source: Source) -> None:
    """Register a data set for `--dataset NAME`."""
    SOURCES[name] = source


def register_backbone(name: str, build: Callable[[int, int], Encoder]) -> None:
    """Register a backbone for `--backbone NAME`: `build(size, in_channels)` returns a module with its `dimension`."""
    BACKBONES[name] = build


def brought(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The part `name` of a table that plugins add to. Raises PluginError if no plugin in this process did."""
    if name not in table:
        raise PluginError(f"no plugin brings the {kind} {name!r}; name it with --plugin")
    return table[name]


class OwnArchitecture(Strict):
    """The architecture of a plugin's backbone. Its artifact is an ONNX graph, so that serving it needs no plugin."""

    name: str
    size: int
    in_channels: Literal[1, 3] = 3

    def build(self) -> Encoder:
        """Build the backbone. Raises PluginError if no plugin in this process registered it, or if it is no encoder."""
        built = brought("backbone", self.name, BACKBONES)(self.size, self.in_channels)
        if not isinstance(built, nn.Module) or not isinstance(getattr(built, "dimension", None), int):
            raise PluginError(f"the backbone {self.name!r} is no module with a whole number `dimension`")
        return built


def load(name: str) -> None:
    """Import MODULE, or call MODULE:FUNCTION, so that it registers its parts. Raises PluginError if that fails."""
    module, separator, _ = name.partition(":")
    if not separator:
        imported_module(module)
        return
    function = found(name)
    try:
        function()
    except (Exception, SystemExit) as error:  # it is foreign code, and may raise any exception
        raise PluginError(f"{name} failed: {type(error).__name__}: {error}") from error


def load_installed() -> None:
    """Load the plugins of all installed distributions. Raises PluginError, which names the one that fails."""
    for entry in entry_points(group=GROUP):
        load(entry.value)


def found(name: str) -> Any:
    """The object MODULE:NAME; the working directory is searched too. Raises PluginError if there is none."""
    module, separator, attribute = name.partition(":")
    if not separator or not attribute:
        raise PluginError(f"{name!r} is not MODULE:NAME, for example my_tracker:start")
    imported = imported_module(module)
    if not hasattr(imported, attribute):
        raise PluginError(f"{name}: {module} has no {attribute!r}")
    return getattr(imported, attribute)


def imported_module(name: str) -> Any:
    """Import a module. Raises PluginError, with the reason, if that fails."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # it is foreign code, and may raise any exception
        absent = not name or (isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0])
        remedy = f"; name a module that is installed or lies in {Path.cwd()}" if absent else ""
        raise PluginError(
            f"{name or 'an empty name'} cannot be imported: {type(error).__name__}: {error}{remedy}"
        ) from error
