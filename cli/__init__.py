"""The front door, `fullrank COMMAND`: one file a command, which imports its rooms only when it runs."""

from collections.abc import Callable

import typer

from cli import check, embed, evaluate, export, fleet, lab, reference, report, serve, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train encoders that do not collapse, serve them, and be paged the moment their embeddings do.",
)
# For a command whose arguments, --help among them, are read by the room it runs in.
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS: tuple[Callable[..., None], ...] = (
    train.train,
    evaluate.evaluate,
    report.report,
    check.check,
    export.export,
    reference.reference,
    serve.serve,
    fleet.fleet,
    embed.embed,
)
for command in COMMANDS:
    app.command(context_settings=FORWARDED if command is serve.serve else None)(command)
app.add_typer(lab.app, name="lab")


def main() -> None:
    app(prog_name="fullrank")
