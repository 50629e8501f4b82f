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
    if taken := next((out / part for part in PARTS if (out / part).exists()), None):
        fail(f"OUT: {taken} exists; give a new folder")
    try:
        for part in PARTS:
            shutil.copytree(SHIPPED / part, out / part)
    except OSError as error:
        fail(f"OUT: {worded(error)}")
    paths = [str(path) for part in PARTS for path in sorted((out / part).rglob("*")) if path.is_file()]
    printed({"files": paths}, "\n".join(paths), as_json)
