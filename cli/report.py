"""fullrank report."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import AsJson, Device, Engine, errors, fail, printed, usable_output, worded, write

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from models.report.album import Album
    from models.report.compare import Comparison
    from models.report.rows import Rows
    from models.report.subject import Progress, Subject

KINDS = "an encoder's folder, a run's folder, a .npy or .parquet file, a folder of .parquet files, or a URL"


def report(
    sources: Annotated[
        list[str], typer.Argument(help="An encoder, run folders, rows in a .npy or .parquet file, or a service's URL.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Compare with this: another encoder, or rows of the same images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of image files to measure the encoder on, or that rows are named after.")
    ] = None,
    limit: Annotated[int, typer.Option(min=64, help="Use at most so many images of --data.")] = 2048,
    column: Annotated[
        str | None, typer.Option(help="Column of a Parquet file that holds the rows.", show_default="embedding")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model of the service, known from POST /observe.", show_default="the served one"),
    ] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: spectrum, measures in plain words, verdict, neighbours, comparison.

    Rows are streamed, so a file may be larger than memory. With two encoders, or two files of rows of the same images,
    the page shows what the first changes for a search that uses the second. Several runs are compared by their curves.

    Example: fullrank report models/pretrained/fashion-byol --against models/pretrained/fashion-directclr

    Example: fullrank report rows.parquet --column embedding --out rows.html
    """
    if against is not None:
        sources = [*sources, against]
    kinds = [_kind(it) for it in sources]
    usable_output(out, "--out")
    if data is not None and not data.is_dir():
        fail(f"--data: {data} is not a folder; give a folder of image files", 2)
    made: tuple[str, dict[str, Any]]
    if set(kinds) == {"run"}:
        made = _runs([Path(it) for it in sources])
    elif len(sources) > 2:
        fail(f"give one or two of {KINDS}; only runs are compared in any number", 2)
    elif set(kinds) == {"service"}:
        made = _services(sources, model)
    elif kinds[0] == "rows" and set(kinds) <= {"rows", "encoder"}:
        made = _rows([Path(it) for it in sources], kinds, column, data)
    elif set(kinds) == {"encoder"}:
        made = _encoders([Path(it) for it in sources], data, limit, device, engine)
    else:
        fail(f"{' and '.join(kinds)} cannot be compared: give two encoders, two files of rows, or rows and then the "
             "encoder that judges them", 2)  # fmt: skip
    page, values = made
    write(out, page.encode(errors="backslashreplace"), "--out")  # names of files need not be Unicode
    printed(values | {"page": str(out)}, str(out), as_json)


def _kind(source: str) -> str:
    """What a source is: service, encoder, run or rows. Ends the command if it is none."""
    if source.startswith(("http://", "https://")):
        return "service"
    path = Path(source)
    if path.is_dir():
        if (path / "encoder.json").is_file():
            return "encoder"
        if (path / "log.jsonl").is_file():
            return "run"
        if any(path.glob("*.parquet")):
            return "rows"
        empty = "is empty" if not any(path.iterdir()) else "holds no encoder.json, log.jsonl or .parquet file"
        fail(f"{path} {empty}: give {KINDS}")
    if not path.exists():
        fail(f"{path} does not exist: give {KINDS}")
    if path.suffix in (".npy", ".parquet"):
        return "rows"
    fail(f"{path}: its name ends neither in .npy nor in .parquet; give {KINDS}")


def _runs(folders: list[Path]) -> tuple[str, dict[str, Any]]:
    from models.report.figures import FiguresError
    from training.report import ReportError, page

    try:
        return page(folders, _command()), {"runs": [str(it) for it in folders]}
    except (ReportError, FiguresError, OSError) as error:
        fail(error)


def _services(urls: list[str], model: str | None) -> tuple[str, dict[str, Any]]:
    from models.report.subject import of_service

    try:
        return _page([of_service(url, _asked(url, model)) for url in urls])
    except ValueError as error:
        fail(error)


def _asked(url: str, model: str | None) -> Any:
    """The answer of a service to GET /spectrum. Ends the command if there is none."""
    import httpx

    address = f"{url.rstrip('/').removesuffix('/spectrum')}/spectrum"
    try:
        answer = httpx.get(address, params={"model": model} if model else {}, timeout=30)
        found = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"{address}: {worded(error)}; is the service running?")
    except ValueError:
        fail(f"{address}: status {answer.status_code}, and no JSON; is this a fullrank service?")
    if answer.status_code != 200 or not isinstance(found, dict):
        said = found.get("error", {}).get("message", "") if isinstance(found, dict) else ""
        fail(f"{address}: status {answer.status_code}. {said}")
    return found


def _rows(paths: list[Path], kinds: list[str], column: str | None, data: Path | None) -> tuple[str, dict[str, Any]]:
    from dataclasses import replace

    from models.artifact import ArtifactError, load
    from models.report.album import Files
    from models.report.rows import RowsError, open_rows
    from models.report.subject import of_rows, reference_of

    notes: list[str] = []
    comparison = None
    names: list[str] | None = None
    try:
        first = open_rows(paths[0], column)
        with _progress() as progress:
            if len(paths) == 1:
                subjects = [of_rows(first, None, "", progress)]
            elif kinds[1] == "encoder":
                artifact = load(paths[1])
                if artifact.reference is None:
                    fail(f"{paths[1]} has no reference to judge by: fullrank reference {paths[1]} --data DIR")
                if others := sorted("@".join(it) for it in first.made_by if not artifact.card.is_of(it[1])):
                    own = f"{artifact.card.name}@{artifact.card.revision}"
                    fail(f"{paths[0]} holds rows of {', '.join(others)}, not of {own}: give the encoder that made them")
                subjects = [of_rows(first, artifact.reference, artifact.card.name, progress)]
            else:
                second = open_rows(paths[1], column)
                judge = reference_of(second, progress) if first.dimension == second.dimension else None
                if judge is None:
                    notes.append(f"{second.path.name} gives no reference to judge {first.path.name} by: it has too few "
                                 "rows, another width, or all rows at one point.")  # fmt: skip
                subjects = [of_rows(first, judge, second.path.name, progress), of_rows(second, None, "", progress)]
                comparison, names = _matched((first, second), notes, progress)
    except (RowsError, ArtifactError, OSError) as error:
        fail(error)
    if data is not None:
        subjects = [replace(it, album=Files(it.ids, data)) if it.ids else it for it in subjects]
    album = Files(names, data) if names and data is not None else None
    return _page(subjects, comparison, names, album, notes)


def _matched(
    opened: "tuple[Rows, Rows]", notes: list[str], progress: "Progress"
) -> "tuple[Comparison | None, list[str] | None]":
    """The comparison of two files of rows, and the names of the rows compared; a note where they do not match."""
    from models.report.compare import Comparison
    from models.report.rows import RowsError
    from models.report.subject import LEAST_COMPARED, same_rows

    try:
        rows, others, names = same_rows(opened, progress)
    except RowsError as error:
        notes.append(f"No comparison of neighbours: {error}.")
        return None, None
    if len(rows) < LEAST_COMPARED:
        notes.append(f"No comparison of neighbours: {len(rows)} rows are too few, {LEAST_COMPARED} are needed.")
        return None, None
    return Comparison.of(rows, others), names


def _encoders(
    folders: list[Path], data: Path | None, limit: int, device: str, engine: Engine
) -> tuple[str, dict[str, Any]]:
    import torch

    from models.artifact import ArtifactError, load
    from models.embedder import Embedder
    from models.references import ImageFolder, ImagesError
    from models.report.compare import Comparison
    from models.report.subject import LEAST_COMPARED, of_encoder

    try:
        loaded = [load(it) for it in folders]
        incumbent = loaded[1] if len(loaded) > 1 else None
        fixed = next((it.canary.images for it in reversed(loaded) if it.canary is not None), None)
        subjects: list[Subject] = []
        with _progress() as progress:
            for it in loaded:
                images = ImageFolder.of(data, limit) if data is not None else None
                embedder = Embedder(it, device, engine=engine)
                against = incumbent if it is not incumbent else None
                subjects.append(of_encoder(it, embedder, against, images, progress, fixed))
    except (ArtifactError, ImagesError, ValueError, OSError) as error:
        fail(error)
    comparison = None
    album = None
    if len(subjects) > 1:
        both = [it.where for it in subjects if it.where is not None]
        common = both[0][torch.isin(both[0], both[1])]
        if len(common) >= LEAST_COMPARED and len({it.facts["images"] for it in subjects}) == 1:
            rows = [it.sample[torch.isin(where, common)] for it, where in zip(subjects, both, strict=True)]
            comparison = Comparison.of(rows[0], rows[1])
            album = _only(subjects[0].album, torch.isin(both[0], common))
    return _page(subjects, comparison, None, album, training=_trained(folders[0]))


def _only(album: "Album | None", mask: "Tensor") -> "Album | None":
    from models.report.album import Arrays

    return album.only(mask) if isinstance(album, Arrays) else album


def _page(
    subjects: "list[Subject]",
    comparison: "Comparison | None" = None,
    names: list[str] | None = None,
    album: "Album | None" = None,
    notes: "Sequence[str]" = (),
    training: "Sequence[Markup]" = (),
) -> tuple[str, dict[str, Any]]:
    from models.report.figures import FiguresError
    from models.report.page import build, described

    for note in [*notes, *(note for it in subjects for note in it.notes)]:
        errors.print(note, soft_wrap=True)
    try:
        page = build(subjects, comparison, names, album, notes, _command(), training)
    except FiguresError as error:
        fail(error)
    return page, described(subjects, comparison)


def _trained(encoder: Path) -> "Sequence[Markup]":
    """The parts of a page on the run that made an encoder, if its log lies in the encoder's folder."""
    from models.report.figures import FiguresError
    from training.report import ReportError, RunLog, sections

    try:
        return sections([RunLog.read(encoder)]) if (encoder / "log.jsonl").is_file() else ()
    except (ReportError, FiguresError, OSError) as error:
        errors.print(f"its run is left out: {error}", soft_wrap=True)
        return ()


def _command() -> str:
    return shlex.join(["fullrank", *sys.argv[1:]])


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A progress display on the terminal; nothing elsewhere."""
    from rich.progress import Progress, TextColumn

    with Progress(TextColumn("{task.description} {task.completed:,}"), console=errors, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda stage, n: bar.update(task, description=stage, advance=n)
