"""fullrank report."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import fail


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page on training runs: curves, spectra over epochs, comparison.

    Example: fullrank report runs/fashion-simclr runs/fashion-directclr --out report.html
    """
    from training.report import ReportError, write

    try:
        write(runs, out)
    except (ReportError, OSError) as error:
        fail(error)
    typer.echo(str(out))
