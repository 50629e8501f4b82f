"""fullrank fleet."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.common import AsJson, console, errors, fail, printed

if TYPE_CHECKING:
    from fullrank.fleet import Figures, Group


def fleet(
    urls: Annotated[list[str], typer.Argument(help="Replicas of one encoder, each with its own address.")],
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The services' key.")] = None,
    window: Annotated[float | None, typer.Option(help="Seconds.", show_default="the longest window kept")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model known from POST /observe.", show_default="the served one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the replicas with their verdicts, and merge their moments into the exact figures of the fleet.

    Replicas of different revisions are listed apart and never averaged. The exit code is 1 if a replica cannot be read,
    stands out or serves another revision.

    Example: fullrank fleet http://10.0.0.7:8000 http://10.0.0.8:8000 --window 300
    """
    from fullrank.fleet import FleetError, survey, to_dict, try_all

    try:
        replicas, unread = try_all(urls, window=window, model=model, key=key)
    except FleetError as error:
        fail(error)
    found = survey(replicas, unread)
    if as_json:
        printed(to_dict(found), "", as_json)
    else:
        for group in found.groups:
            _show(group)
    for reason in unread.values():
        errors.print(f"fullrank: {reason}", style="red", soft_wrap=True)
    for problem in found.problems[len(unread) :]:
        errors.print(f"fullrank: {problem}", style="red", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


def _show(group: "Group") -> None:
    title = f"{group.model} {group.revision}, last {group.window} s"
    columns = ("", "verdict", "rows seen", "in window", "effective rank", "participation ratio", "total variance")
    table = Table(*columns, title=title)
    for it in group.members:
        table.add_row(it.url, it.verdict, "" if it.seen is None else str(it.seen), *_cells(it.figures))
    table.add_row("fleet, exact", "", "", *_cells(group.whole))
    table.add_row("sum of rates", "", "", "", "", f"{group.summed_participation_ratio:.1f}", "")
    console.print(table)
    typer.echo(
        "The sum weighs each replica by its variance squared: a collapsed replica vanishes from it, and what differs "
        "between replicas is not in it. Alert on each replica; believe the exact line for the fleet."
    )


def _cells(it: "Figures") -> tuple[str, ...]:
    rank = f"{it.effective_rank:.1f}" if it.effective_rank >= 0 else f"needs about {it.minimum_rows} rows"
    return str(it.rows), rank, f"{it.participation_ratio:.1f}", f"{it.total_variance:.4g}"
