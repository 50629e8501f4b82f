"""fullrank serve."""

import typer

from cli.common import fail


def serve(context: typer.Context) -> None:
    """Serve an encoder over HTTP; `fullrank serve --help` lists every setting."""
    from pydantic import ValidationError
    from pydantic_settings import CliApp

    from service.http.app import serve as run_service
    from service.settings import Settings

    try:
        run_service(CliApp.run(Settings, context.args))
    except ValidationError as error:
        fail("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()), 2)
    except RuntimeError as error:
        fail(error)
