"""fullrank reference."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, Device, Dtype, Engine, errors, fail, show, usable_folder, usable_output, write

URLS = ("http://", "https://")
ROWS = "embeddings alone: a .npy or .parquet file, a folder of .parquet files, or a URL of a .npy file"


def reference(
    source: Annotated[
        str,
        typer.Argument(help=f"The encoder's folder; or {ROWS}."),
    ],
    data: Annotated[Path | None, typer.Option(help="Folder of image files like those it will be sent.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set by name, in --data or its usual place.")] = None,
    canary: Annotated[
        str, typer.Option(help="Folder of images that may be redistributed, or `synthetic`.")
    ] = "synthetic",
    licence: Annotated[str, typer.Option(help="Licence of the images of --canary DIR.")] = "unstated",
    limit: Annotated[int, typer.Option(min=128, help="Use at most so many images.")] = 40_000,
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(help="Write to this folder instead of the encoder's own.")] = None,
    replace_old: Annotated[
        bool, typer.Option("--replace", help="Even if the encoder has a reference already.")
    ] = False,
    column: Annotated[
        str | None, typer.Option(help="Column of a Parquet file that holds the embeddings.", show_default="embedding")
    ] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """Give an encoder a reference: what its embeddings of healthy traffic look like, and canary images.

    From embeddings alone the reference is a file, for POST /observe and for SpectrumMonitor; it has no canary.

    Example: fullrank reference my-encoder --data photographs/ --canary synthetic

    Example: fullrank reference rows.npy --out references/theirs.safetensors
    """
    if not source.startswith(URLS) and not Path(source).exists():
        fail(f"{source} does not exist: give an encoder's folder, or {ROWS}")
    if _holds_rows(source):
        values = _of_rows(source, column, dtype, limit, out, replace_old)
        show(values, "reference", as_json)
        return
    encoder = Path(source)
    if not encoder.is_dir():
        fail(f"{source} is no encoder's folder: give one, or {ROWS}")
    usable_folder(out or encoder, "--out" if out else "SOURCE")
    import torch

    from models import references as room
    from models.artifact import ArtifactError, load, save
    from models.embedder import Embedder
    from models.gate import hold_to_float32
    from training.data import SOURCES, DataError, chunks_of, load_data
    from training.progress import stages

    if data is None and dataset is None:
        fail("--data: give a folder of image files, or --dataset one of " + ", ".join(SOURCES), 2)
    if dataset is not None and dataset not in SOURCES:
        fail(f"--dataset: {dataset!r} is none of {', '.join(SOURCES)}", 2)
    try:
        artifact = load(encoder, referenced=not (out or replace_old))  # the old one may be what is wrong with it
        if artifact.reference is not None:
            fail(f"{encoder} has a reference already; --replace it, or write elsewhere with --out", 2)
        preprocessing = artifact.card.preprocessing
        images = room.ImageFolder.of(data, limit) if dataset is None and data else None
        if images is not None:
            count = len(images)
            room.enough(count, artifact.card.dimension)
            pixels = images.pixels(preprocessing)
        else:
            # Use test images: images that the encoder was trained on are embedded a little too well.
            test = load_data(str(dataset), data)[1]
            count = min(limit, len(test))
            pixels = chunks_of(test, preprocessing, limit)
        fixed = room.canary_images(None if canary == "synthetic" else Path(canary), preprocessing)
        embedder = Embedder(artifact, device, getattr(torch, dtype), engine=engine)
        hold_to_float32(embedder, artifact, fixed)
        with stages(errors, embedding=count) as progress:
            done = room.from_images(
                artifact,
                pixels,
                fixed,
                room.SYNTHETIC if canary == "synthetic" else licence,
                embedder=embedder,
                progress=progress,
            )
        save(done, out or encoder)
    except (ArtifactError, DataError, room.ImagesError, OSError) as error:
        fail(error)
    skipped = images.skipped if images is not None else []
    if images is not None and skipped:
        errors.print(f"{len(skipped)} files skipped: {images.reasons()}", soft_wrap=True)
    made = done.reference
    assert made is not None
    if made.calibration is None:
        errors.print("too few images to calibrate thresholds on: general ones are used")
    values = {"encoder": str(out or encoder), "rows": made.rows, "skipped": len(skipped), "canary": len(fixed)}
    values |= {"participation_ratio": made.participation_ratio, "effective_rank": made.effective_rank}
    show(values | {"calibrated": made.calibration is not None}, "reference", as_json)


def _holds_rows(source: str) -> bool:
    """Whether a source is embeddings and no encoder."""
    path = Path(source)
    if source.startswith(URLS) or path.suffix in (".npy", ".parquet"):
        return True
    return path.is_dir() and not (path / "encoder.json").is_file() and any(path.glob("*.parquet"))


def _of_rows(
    source: str, column: str | None, dtype: str, limit: int, out: Path | None, replace_old: bool
) -> dict[str, object]:
    """Build a reference from embeddings and write it to a file. Ends the command where that cannot be done."""
    import tempfile
    import warnings

    import torch
    from rich.progress import Progress
    from safetensors.torch import save

    from fullrank import Reference
    from models.report.rows import RowsError, open_rows

    if out is None or out.suffix != ".safetensors":
        fail("--out: give a file that ends in .safetensors, named after the model that POST /observe will name", 2)
    if out.exists() and not replace_old:
        fail(f"--out: {out} exists; --replace it, or name another file", 2)
    usable_output(out, "--out")
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = _fetched(source, Path(folder)) if source.startswith(URLS) else Path(source)
            rows = torch.cat([torch.as_tensor(chunk.rows) for chunk in open_rows(path, column).chunks()])
        except (RowsError, OSError) as error:
            fail(error)
    finite = rows.double().square().sum(1).isfinite()
    skipped = len(rows) - int(finite.sum())
    rows = rows[finite]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    rows = rows[order[:limit]]
    with Progress(console=errors, transient=True) as bar, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        task = bar.add_task("calibrating", total=None)
        try:
            made = Reference.build(
                rows, dtype=dtype, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
        except ValueError as error:
            fail(f"{source}: {error}")
    for warning in warned:
        errors.print(f"fullrank: {warning.message}", style="yellow", soft_wrap=True)
    write(out, save(made.tensors()), "--out")
    values: dict[str, object] = {"reference": str(out), "rows": len(rows), "skipped": skipped}
    values |= {"dimension": made.dimension, "participation_ratio": made.participation_ratio}
    return values | {"effective_rank": made.effective_rank, "calibrated": made.calibration is not None}


def _fetched(url: str, folder: Path) -> Path:
    """Download a .npy file. Ends the command where there is none."""
    import httpx

    path = folder / "rows.npy"
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer, path.open("wb") as file:
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                file.write(chunk)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"{url}: {error}")
    return path
