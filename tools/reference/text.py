"""Markdown for the generated pages."""

import re
from collections.abc import Iterable


def cell(text: str) -> str:
    """Text for one cell of a table: one line, no bar that would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table; every row has as many cells as the header."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell(it) for it in line)} |\n" for line in lines)


def prose(text: str) -> str:
    """A docstring as Markdown: double backticks become single ones, and what could pass for a tag is escaped."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return re.sub(r"<(?=[a-zA-Z/])", "&lt;", text)
