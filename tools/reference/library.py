"""docs/reference/library.md: the library's public names, with signatures and docstrings."""

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

from tools.reference.text import prose

# Public modules in the order in which a reader needs them, and of some the names that are public; else all.
MODULES: dict[str, tuple[str, ...] | None] = {
    "fullrank": (),
    "fullrank.measures": None,
    "fullrank.moments": None,
    "fullrank.monitor": None,
    "fullrank.monitor.snapshot": ("Snapshot", "Counters"),
    "fullrank.statistics": ("WindowStatistics", "Band"),
    "fullrank.bounds": ("Interval",),
    "fullrank.reference": None,
    "fullrank.descriptors": None,
    "fullrank.neighbours": (
        "squared_distances",
        "nearest",
        "overlap",
        "rank_correlation",
        "nearest_angle",
        "hubness",
        "local_dimension",
        "LocalDimension",
    ),
    "fullrank.verdict": None,
    "fullrank.exposition": None,
    "fullrank.client": None,
    "fullrank.fleet": None,
    "fullrank.merging": None,
}
HEAD = """# Library

What `pip install fullrank` gives. `python -m tools.reference` writes this page from the docstrings. The HTTP client and
the Prometheus collector need the extras `fullrank[client]` and `fullrank[prometheus]`.
"""


class Shown:
    """A default as it is shown in a signature."""

    def __init__(self, default: Any) -> None:
        self.text = repr(default)
        if isinstance(default, str):
            self.text = f'"{default}"'
        elif inspect.isbuiltin(default):
            self.text = f"{default.__module__}.{default.__name__}"
        elif inspect.isfunction(default) or self.text == "<factory>":
            self.text = "..."

    def __repr__(self) -> str:
        return self.text


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's public classes and functions: those named above or in `__all__`, else those that are defined there."""
    names = MODULES[module.__name__]
    if names is None:
        names = getattr(module, "__all__", None)
    for name in names if names is not None else vars(module):
        thing = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if names is not None or thing.__module__ == module.__name__:
            yield name, thing


def signature(name: str, thing: Any) -> str:
    """The signature without the packages' names in its annotations."""
    try:
        given = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    empty = inspect.Parameter.empty
    shown = [it if it.default is empty else it.replace(default=Shown(it.default)) for it in given.parameters.values()]
    text = str(given.replace(parameters=shown))
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])|\bnumpy\.", "", text)
    return f"{name}{text}".replace("'", "").replace("(self, ", "(").replace("(self)", "()")


def described(thing: Any) -> str:
    """The docstring as Markdown, with indented parts kept as they are."""
    return prose(inspect.cleandoc(thing.__doc__ or "")).strip()


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods and properties that say what they do: how each is written, and what says it."""
    for word, member in vars(thing).items():
        name = f"{thing.__name__}.{word}"
        inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        read = inner.fget if isinstance(inner, property) else inner.func if isinstance(inner, cached_property) else None
        if word.startswith("_") or not inner.__doc__:
            continue
        if inspect.isfunction(inner):
            yield signature(name, inner), inner
        elif read is not None:
            yield signature(name, read).replace("() -> ", ": "), inner


def section(name: str, thing: Any) -> str:
    """One class or function."""
    text = f"\n### {name}\n\n```python\n{signature(name, thing)}\n```\n\n{described(thing)}\n"
    if inspect.isclass(thing):
        for written, member in members(thing):
            text += f"\n**`{written}`**\n\n{described(member)}\n"
    return text


def page() -> str:
    made = HEAD
    shown: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        made += f"\n## {name}\n\n{described(module)}\n"
        for word, thing in public(module):
            if id(thing) not in shown:
                shown.add(id(thing))
                made += section(word, thing)
    return made
