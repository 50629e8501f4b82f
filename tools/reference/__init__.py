"""Writes docs/reference from the code: metrics, alerts, HTTP, the command line, the library.

`python -m tools.reference` writes the pages, and a test compares them.
"""

from collections.abc import Callable

from tools.reference import alerts, command_line, http, library, metrics

# The page's name in docs/reference and what writes it.
PAGES: dict[str, Callable[[], str]] = {
    "alerts.md": alerts.page,
    "command-line.md": command_line.page,
    "http.md": http.page,
    "library.md": library.page,
    "metrics.md": metrics.page,
}
