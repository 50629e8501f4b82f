"""Runs the generator: `python -m tools.reference`."""

from pathlib import Path

from tools.reference import PAGES

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"

for name, page in PAGES.items():
    (FOLDER / name).write_text(page())
    print(f"docs/reference/{name}")
