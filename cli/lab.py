"""fullrank lab."""

import inspect
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console
from rich.markup import escape

from cli.common import AsJson, fail, printed, usable_folder, worded
from theory import NAMES

if TYPE_CHECKING:
    from theory.lab import Lab, Result, Settings

Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for NAME.png and NAME.json, which holds the curves too.")
]


class Labs(typer.core.TyperGroup):
    """The group of lab commands. A lab's command is made when it is needed: importing all labs takes a second."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*NAMES, "all"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(cmd_name) if cmd_name in self.list_commands(ctx) else None


app = typer.Typer(
    cls=Labs,
    invoke_without_command=True,
    help="Run a theory experiment and compare what is seen with what must be seen.",
)


@app.callback()
def lab(
    context: typer.Context,
    listed: Annotated[bool, typer.Option("--list", help="Name the labs and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a theory experiment and compare what is seen with what must be seen.

    Exit code 0: every claim holds. 1: one fails, or the run diverges. 2: a parameter is outside its domain.

    Example: fullrank lab strong-augmentation --amplitude 1
    """
    if listed or context.invoked_subcommand is None:
        from theory.lab import find

        titles = {name: find(name).title for name in NAMES}
        listing = "\n".join(f"{name:26}{title}" for name, title in titles.items())
        printed(titles, f"{listing}\n\nfullrank lab NAME --help shows a lab's parameters.", as_json)
        raise typer.Exit


def _command(name: str) -> Any:
    """The command of one lab, or of `all`, which has only the options that every lab shares."""
    from theory.lab import Settings, describe_domain, find

    labs = [find(each) for each in NAMES] if name == "all" else [find(name)]
    parameters = labs[0].parameters if len(labs) == 1 else Settings

    def command(as_json: bool, out: Path, **given: Any) -> None:
        _run(labs, given, as_json, out)

    options = [inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)]
    options.append(inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=Path("runs/lab"), annotation=Out))
    for key, entry in parameters.model_fields.items():
        domain = "" if entry.annotation is str else f" ({describe_domain(entry)})"
        option = typer.Option(help=escape(f"{entry.description}{domain}"))
        annotation = Annotated[entry.annotation, option]  # type: ignore[name-defined]
        kind = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(key, kind, default=entry.default, annotation=annotation))
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    title = labs[0].title if len(labs) == 1 else "Every lab, then one table."
    example = labs[0].example if len(labs) == 1 else "--seed 3"
    command.__doc__ = f"{title}\n\nExample: fullrank lab {name} {example}"
    single = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    single.command(name)(command)
    return typer.main.get_command(single)


def _run(labs: "list[Lab]", given: dict[str, Any], as_json: bool, out: Path) -> None:
    """Run labs, print their claims and write their files; ends with the exit code."""
    usable_folder(out, "--out")
    import torch

    from theory.lab import Diverged, ParameterError
    from theory.render import document, show, table

    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it gives
    try:
        parameters = [lab.parameters(**given) for lab in labs]  # every domain is checked before anything runs
    except ParameterError as error:
        fail(error, 2)
    console = Console(stderr=as_json)
    results: list[tuple[str, Result]] = []
    documents: list[dict[str, Any]] = []
    failed = False
    for lab, settings in zip(labs, parameters, strict=True):
        start = time.perf_counter()
        try:
            with console.status(f"{lab.name} ..."):
                result = lab.run(settings)
        except ParameterError as error:
            fail(error, 2)
        except Diverged as error:
            console.print(f"{lab.name} diverged: {error}", style="bold red", highlight=False, markup=False)
            documents.append({"lab": lab.name, "holds": False, "diverged": str(error)})
            failed = True
            continue
        seconds = time.perf_counter() - start
        results.append((lab.name, result))
        documents.append(document(lab, settings, result, seconds, series=False))
        failed |= not result.holds
        if len(labs) == 1 and not as_json:
            show(console, lab, result, seconds)
        elif not as_json:
            console.print(f"{lab.name}: {result.counts} ({seconds:.1f} s)", highlight=False, markup=False)
        _write(lab, settings, result, seconds, out, console)
    if len(labs) > 1 and results and not as_json:
        console.print(table("every lab", results))
    if as_json:
        printed(documents if len(labs) > 1 else documents[0], "", as_json)
    raise typer.Exit(int(failed))


def _write(lab: "Lab", settings: "Settings", result: "Result", seconds: float, out: Path, console: Console) -> None:
    from theory.render import PictureError, document, picture

    found = document(lab, settings, result, seconds, series=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{lab.name}.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")
        picture(lab, result, out / f"{lab.name}.png")
    except PictureError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False)
    except OSError as error:
        fail(f"--out: {worded(error)}")
