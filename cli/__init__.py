"""The front door, `fullrank COMMAND`: one file a command, which imports its rooms only when it runs."""

from collections.abc import Callable

import typer

from cli import check, embed, evaluate, fleet, lab, reference, report, serve, train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train encoders that do not collapse, serve them, and be paged the moment their embeddings do.",
)
# For commands whose arguments, --help among them, are read by the room they run in.
FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
COMMANDS: tuple[Callable[..., None], ...] = (
    train.train,
    evaluate.evaluate,
    report.report,
    check.check,
    reference.reference,
    serve.serve,
    fleet.fleet,
    embed.embed,
    lab.lab,
)
for command in COMMANDS:
    app.command(context_settings=FORWARDED if command in (serve.serve, lab.lab) else None)(command)


def main() -> None:
    app(prog_name="fullrank")
