"""fullrank fleet."""

import json
from typing import Annotated

import typer
from rich.table import Table

from cli.common import AsJson, console, fail


def fleet(
    urls: Annotated[list[str], typer.Argument(help="Replicas of one encoder, each with its own address.")],
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The services' key.")] = None,
    window: Annotated[float | None, typer.Option(help="Seconds.", show_default="the longest window kept")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model known from POST /observe.", show_default="the served one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge the replicas' moments into the fleet's exact effective rank, beside each replica's own figures.

    Example: fullrank fleet http://10.0.0.7:8000 http://10.0.0.8:8000 --window 300
    """
    from dataclasses import asdict

    from fullrank.fleet import FleetError, combine, read_all
    from fullrank.monitor.snapshot import to_json

    try:
        found = combine(read_all(urls, window=window, model=model, key=key))
    except FleetError as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps(to_json(asdict(found)), indent=2))
        return
    title = f"{found.model} {found.revision}, last {found.window} s"
    table = Table("", "rows", "effective rank", "participation ratio", "total variance", title=title)
    for name, it in [*found.replicas.items(), ("fleet, exact", found.whole)]:
        rank = f"{it.effective_rank:.1f}" if it.effective_rank >= 0 else f"needs about {it.minimum_rows} rows"
        table.add_row(name, str(it.rows), rank, f"{it.participation_ratio:.1f}", f"{it.total_variance:.4g}")
    table.add_row("sum of rates", "", "", f"{found.summed_participation_ratio:.1f}", "")
    console.print(table)
    typer.echo(
        "The sum weighs each replica by its variance squared: a collapsed replica vanishes from it, and what differs "
        "between replicas is not in it. Alert on each replica; believe the exact line for the fleet."
    )
