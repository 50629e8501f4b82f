"""docs/reference/library.md: the library's public names, with signatures and docstrings."""

import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tools.reference.text import prose

# Public modules in the order in which a reader needs them.
MODULES = (
    "fullrank",
    "fullrank.measures",
    "fullrank.moments",
    "fullrank.monitor",
    "fullrank.reference",
    "fullrank.descriptors",
    "fullrank.verdict",
    "fullrank.exposition",
    "fullrank.client",
    "fullrank.fleet",
)
HEAD = """# Library

What `pip install fullrank` gives. `python -m tools.reference` writes this page from the docstrings. The HTTP client and
the Prometheus collector need the extras `fullrank[client]` and `fullrank[prometheus]`.
"""


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """A module's public classes and functions: those of `__all__`, else those that are defined there."""
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
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return name
    text = re.sub(r"<function \S+ at 0x[0-9a-f]+>", "...", text)  # a default that is a function
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])|\bnumpy\.", "", text)
    return f"{name}{text}".replace("'", "").replace("(self, ", "(").replace("(self)", "()")


def described(thing: Any) -> str:
    """The docstring as Markdown, with indented parts kept as they are."""
    return prose(inspect.cleandoc(thing.__doc__ or "")).strip()


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """A class's own public methods that say what they do."""
    for name, member in vars(thing).items():
        inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and inspect.isfunction(inner) and inner.__doc__:
            yield name, inner


def section(name: str, thing: Any) -> str:
    """One class or function."""
    text = f"\n### {name}\n\n```python\n{signature(name, thing)}\n```\n\n{described(thing)}\n"
    if inspect.isclass(thing):
        for word, member in members(thing):
            text += f"\n**`{signature(f'{name}.{word}', member)}`**\n\n{described(member)}\n"
    return text


def page() -> str:
    made = HEAD
    shown: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        made += f"\n## {name}\n\n{described(module)}\n"
        for word, thing in public(module):
            if id(thing) not in shown and name != "fullrank":
                shown.add(id(thing))
                made += section(word, thing)
    return made
