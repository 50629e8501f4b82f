"""The command `fullrank`. Each subcommand has a file, which imports other packages only when it runs."""

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from cli import (
    check,
    doctor,
    embed,
    evaluate,
    export,
    fleet,
    import_,
    lab,
    metrics,
    reference,
    report,
    rules,
    serve,
    train,
)
from cli._completion import mend_zsh
from cli.common import EXIT_CODES, complain, plain_warnings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train encoders that do not collapse, serve them, and be paged the moment their embeddings do.",
    epilog=f"Exit codes: {'; '.join(f'{code} {words}' for code, words in EXIT_CODES.items())}.",
)
# For a command whose arguments, also --help, are parsed by the package that it runs.
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS: tuple[Callable[..., None], ...] = (
    train.train,
    evaluate.evaluate,
    report.report,
    import_.import_,
    check.check,
    export.export,
    reference.reference,
    serve.serve,
    fleet.fleet,
    embed.embed,
    rules.rules,
    metrics.metrics,
    doctor.doctor,
)
for command in COMMANDS:
    name = command.__name__.rstrip("_")  # `import` is a word of Python
    app.command(name, context_settings=FORWARDED if command is serve.serve else None)(command)
app.add_typer(lab.app, name="lab")


def show_version(asked: bool) -> None:
    if asked:
        from fullrank import __version__

        typer.echo(f"fullrank {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command. What the system refuses (a folder, a disk) ends it with a sentence, wherever it happens."""
    mend_zsh()
    plain_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    try:
        app(prog_name="fullrank")
    except OSError as error:
        complain(error)
        sys.exit(1)
