"""Your own methods, backbones, data sets and trackers, from modules that are no part of this project."""

import importlib
import sys
from pathlib import Path
from typing import Any


class PluginError(ValueError):
    """A plugin that cannot be imported; the message says why."""


def found(name: str) -> Any:
    """What MODULE:NAME names; the folder the command runs in is looked in too. PluginError when there is none."""
    module, separator, attribute = name.partition(":")
    if not separator or not attribute:
        raise PluginError(f"{name!r} is not MODULE:NAME, for example my_tracker:start")
    imported = imported_module(module)
    if not hasattr(imported, attribute):
        raise PluginError(f"{name}: {module} has no {attribute!r}")
    return getattr(imported, attribute)


def imported_module(name: str) -> Any:
    """The module of that name. PluginError, with the reason, when it cannot be imported."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:  # it is somebody's code, and may raise anything
        raise PluginError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
