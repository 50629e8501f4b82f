"""fullrank serve."""

import typer

from cli.common import fail, unusable


def serve(context: typer.Context) -> None:
    """Serve an encoder over HTTP; `fullrank serve --help` lists every setting."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp

    from service.http.app import serve as run_service
    from service.settings import NONE, Settings

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


def _words(setting: str, message: str) -> str:
    """The error about a setting, in words. A message on several settings or an unknown variable names them itself."""
    message = message.removeprefix("Value error, ")
    return f"{setting}: {message}" if setting else message
