"""fullrank lab."""

import typer


def lab(context: typer.Context) -> None:
    """Run a theory experiment and compare what is seen with what must be seen; `fullrank lab --list`."""
    from theory.command import main as run_lab

    raise typer.Exit(run_lab(context.args))
