"""The parts of a page that a benchmark writes: what lies between two markers of its own."""

from pathlib import Path


def write_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what lies between the markers, each there once. ValueError for a page without them."""
    before, rest = page.read_text().split(start)
    _, after = rest.split(end)
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")
