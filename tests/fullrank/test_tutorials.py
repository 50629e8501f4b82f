"""The tutorials on the library: their Python runs from top to bottom, and prints what they say it prints."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = ("is-it-collapsed", "training-loop", "compare-encoders")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def outputs(page: str) -> list[tuple[str, str]]:
    """(what a block prints, what the page says it prints) of each Python block that prints, or that should."""
    space: dict[str, Any] = {}
    found: list[tuple[str, str]] = []
    printed = ""
    for language, content in BLOCK.findall((FOLDER / f"{page}.md").read_text()):
        if language == "python":
            if printed:
                found.append((printed, ""))
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(content, f"{page}.md", "exec"), space)
            printed = output.getvalue()
        elif language == "text":
            found.append((printed, content))
            printed = ""
    return [*found, (printed, "")] if printed else found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_says(page: str) -> None:
    shown = outputs(page)
    assert shown
    for printed, said in shown:
        assert NUMBER.sub("N", printed) == NUMBER.sub("N", said), printed
        # Another processor or release of torch rounds and draws a little otherwise.
        pairs = zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True)
        assert [(a, b) for a, b in pairs if float(a) != pytest.approx(float(b), rel=0.1, abs=0.03)] == [], printed
