"""What a benchmark keeps and writes: its records, what lies between two markers of a page, and how a mean is told."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def records_in(results: Path) -> list[dict[str, Any]]:
    """The records of a benchmark, one a line of JSON; none if there is no file yet."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def write_between(page: Path, start: str, end: str, text: str) -> None:
    """Replace what lies between the markers, each there once. ValueError for a page without them."""
    before, rest = page.read_text().split(start)
    _, after = rest.split(end)
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """The mean over seeds ± its standard error; a single seed has none."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"
