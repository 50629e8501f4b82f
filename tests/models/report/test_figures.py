"""Pictures of a report: the dark one, made from the light one, is the one that matplotlib draws in dark colours."""

import base64
import re
from collections.abc import Callable
from typing import Any

import pytest

from fullrank.bounds import Interval
from models.report import figures

BANDS = [
    {"first": 1, "last": 4, "ratio": {"lower": 0.8, "estimate": 1.0, "upper": 1.2}},
    {"first": 5, "last": 8, "ratio": {"lower": None, "estimate": 0.1, "upper": None}},
]
LIMITS = {"tail_energy_ratio_low": 0.5, "tail_energy_ratio_high": 2.0}
PICTURES: dict[str, Callable[[], str]] = {
    "spectrum": lambda: figures.spectrum({"now": [3.0, 2.0, 1e-3], "reference": [2.0, 1.0, 0.5]}, "Spectrum"),
    "bands": lambda: figures.bands(BANDS, LIMITS, "Bands"),
    "overlaps": lambda: figures.overlaps({1: Interval(0.2, 0.3, 0.4), 5: Interval(0.1, 0.2, 0.3)}, "Neighbours"),
    "distances": lambda: figures.distances([0.1, 0.2, 0.9], [0.0, 0.3, 0.8], ("a", "b"), "Pairs"),
}


def drawn(picture: str) -> list[str]:
    """The dark and the light SVG of a picture; matplotlib's identifiers, which hash the colours, are numbered."""
    found = [base64.b64decode(it).decode() for it in re.findall(r"data:image/svg\+xml;base64,([^']+)", picture)]
    assert len(found) == 2
    return [numbered(it) for it in found]


def numbered(svg: str) -> str:
    names = dict.fromkeys(re.findall(r'id="([a-z][0-9a-f]{10})"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, f"name-{number}")
    return svg


@pytest.mark.parametrize("name", PICTURES)
def test_the_dark_picture_is_the_one_drawn_in_dark_colours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dark, light = drawn(PICTURES[name]())
    assert "<svg" in light
    monkeypatch.setattr(figures, "THEMES", (figures.THEMES[1], figures.THEMES[1]))
    again: Any = drawn(PICTURES[name]())
    assert dark == again[1]
    assert dark != light
