"""fullrank serve."""

import difflib
from collections.abc import Iterable

import typer

from cli.common import fail, unusable


def serve(context: typer.Context) -> None:
    """Serve an encoder over HTTP; `fullrank serve --help` lists every setting."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp

    from service.http.app import serve as run_service
    from service.settings import NONE, Settings

    _refuse_unknown(context.args, Settings.model_fields)
    try:
        settings = CliApp.run(Settings, context.args)
    except ValidationError as error:
        fail("; ".join(_words(".".join(map(str, it["loc"])), it["msg"]) for it in error.errors()), 2)
    if settings.encoder != NONE and (reason := unusable(settings.device)):
        fail(f"device: {reason}", 2)
    try:
        run_service(settings)
    except RuntimeError as error:
        fail(error)


def _refuse_unknown(arguments: Iterable[str], settings: Iterable[str]) -> None:
    """End the command at an option that does not exist. argparse prints sixty lines of usage before it says so."""
    options = {f"--{name.replace('_', '-')}" for name in settings}
    known = {"--help"} | options | {f"--no-{option[2:]}" for option in options}
    for option in (it.partition("=")[0] for it in arguments if it.startswith("--")):
        if option not in known:
            near = difflib.get_close_matches(option.replace("_", "-"), sorted(options), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "`fullrank serve --help` lists them"
            fail(f"{option} is no option of fullrank serve; {hint}", 2)


def _words(setting: str, message: str) -> str:
    """The error about a setting, in words. A message on several settings or an unknown variable names them itself."""
    message = message.removeprefix("Value error, ")
    return f"{setting}: {message}" if setting else message
