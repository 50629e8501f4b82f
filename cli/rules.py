"""fullrank rules."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, fail, printed, usable_folder, worded

SHIPPED = Path(__file__).resolve().parents[1] / "deploy"
PARTS = ("alertmanager", "grafana", "prometheus/rules")


def rules(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    as_json: AsJson = False,
) -> None:
    """Write the alert rules, Alertmanager's configuration and the dashboards that belong to this version.

    Example: fullrank rules monitoring/
    """
    usable_folder(out, "OUT")
    try:
        for part in PARTS:
            shutil.copytree(SHIPPED / part, out / part)
    except OSError as error:
        fail(f"{worded(error)}; give a new folder" if isinstance(error, FileExistsError) else error)
    paths = [str(path) for path in sorted(out.rglob("*")) if path.is_file()]
    printed({"files": paths}, "\n".join(paths), as_json)
