"""docs/reference/command-line.md: every command with its arguments and options, from the Typer application."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from cli import app
from tools.reference.text import prose, table

HEAD = """# Command line

`fullrank COMMAND --help` shows the same. `python -m tools.reference` writes this page.

"""
TYPES = {Path: "PATH", int: "INTEGER", float: "NUMBER"}


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of the tree of commands, each with its full name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word in command.list_commands(None):
        below = command.get_command(None, word)
        if not below.hidden:
            yield from commands(below, f"{name} {word}")


def value(parameter: Any) -> str:
    """A default as it is typed, or what stands in its place in words; empty where there is none."""
    default = parameter.default
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if default is None or default is False or default == "" or callable(default) or parameter.required:
        return ""
    if isinstance(default, list | tuple):
        return " ".join(f"`{it}`" for it in default)
    return f"`{getattr(default, 'value', default)}`"


def spelling(parameter: Any) -> str:
    """How a parameter is written."""
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name).upper()}`"
    words = [*parameter.opts, *parameter.secondary_opts]
    if parameter.is_flag:
        return ", ".join(f"`{word}`" for word in words)
    kind = parameter.metavar or TYPES.get(parameter.type_descriptor.annotation, "TEXT")
    return ", ".join(f"`{word} {kind}`" for word in words)


def usage(name: str, arguments: list[Any]) -> str:
    """The command with its arguments; in brackets those that may be left out."""
    words = [name]
    for it in arguments:
        word = f"{(it.metavar or it.name).upper()}{'...' * (it.nargs == -1)}"
        words.append(word if it.required else f"[{word}]")
    return " ".join(words)


def meaning(parameter: Any) -> str:
    """What it is for, and the variable that sets it too."""
    said = prose(getattr(parameter, "help", "") or "")
    return f"{said} Or `{parameter.envvar}`." if parameter.envvar else said


def section(name: str, command: Any) -> str:
    """One command."""
    parameters = [it for it in command.params if it.name != "help" and not getattr(it, "hidden", False)]
    wanted = [it for it in parameters if it.param_type_name == "argument"]
    options = " [OPTIONS]" if len(wanted) < len(parameters) else ""
    made = f"\n## {name}\n\n```text\n{usage(name, wanted)}{options}\n```\n\n{prose(command.help or '').strip()}\n"
    if parameters:
        rows = ((spelling(it), value(it), meaning(it)) for it in parameters)
        made += "\n" + table(("", "default", "meaning"), rows)
    if name == "fullrank serve":
        made += "\nEvery [setting](settings.md#settings) is an option too: `FULLRANK_MAX_BATCH` is `--max-batch`.\n"
    return made


def page() -> str:
    root = typer.main.get_command(app)
    found = commands(root, "fullrank")
    return HEAD + f"{root.epilog}\n" + "".join(section(name, command) for name, command in found)
