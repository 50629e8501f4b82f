"""fullrank reference."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, Device, Engine, errors, fail, show


def reference(
    encoder: Annotated[Path, typer.Argument(help="The encoder's folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder of image files like those it will be sent.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set by name, in --data or its usual place.")] = None,
    canary: Annotated[
        str, typer.Option(help="Folder of images that may be redistributed, or `synthetic`.")
    ] = "synthetic",
    licence: Annotated[str, typer.Option(help="Licence of the images of --canary DIR.")] = "unstated",
    limit: Annotated[int, typer.Option(min=128, help="Use at most so many images.")] = 40_000,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, as it will be served.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write to this folder instead of the encoder's own.")] = None,
    replace_old: Annotated[
        bool, typer.Option("--replace", help="Even if the encoder has a reference already.")
    ] = False,
    device: Device = "cpu",
    engine: Engine = "auto",
    as_json: AsJson = False,
) -> None:
    """Give an encoder a reference: what its embeddings of healthy traffic look like, and canary images.

    Example: fullrank reference my-encoder --data photographs/ --canary synthetic
    """
    import torch
    from rich.progress import Progress

    from models import references as room
    from models.artifact import ArtifactError, load, save
    from models.embedder import Embedder
    from training.data import SOURCES, DataError, chunks_of, load_data

    if dtype not in ("float32", "bfloat16"):
        fail(f"--dtype: {dtype!r} is neither float32 nor bfloat16", 2)
    if data is None and dataset is None:
        fail("--data: give a folder of image files, or --dataset one of " + ", ".join(SOURCES), 2)
    if dataset is not None and dataset not in SOURCES:
        fail(f"--dataset: {dataset!r} is none of {', '.join(SOURCES)}", 2)
    try:
        artifact = load(encoder)
        if artifact.reference is not None and not (out or replace_old):
            fail(f"{encoder} has a reference already; --replace it, or write elsewhere with --out", 2)
        preprocessing = artifact.card.preprocessing
        images = room.ImageFolder.of(data, limit) if dataset is None and data else None
        if images is not None:
            count = len(images)
            pixels = images.pixels(preprocessing)
        else:
            # Use test images: images that the encoder was trained on are embedded a little too well.
            test = load_data(str(dataset), data)[1]
            count = min(limit, len(test))
            pixels = chunks_of(test, preprocessing, limit)
        fixed = room.canary_images(None if canary == "synthetic" else Path(canary), preprocessing)
        with Progress(console=errors, transient=True) as bar:
            task = bar.add_task("embedding", total=count)
            done = room.from_images(
                artifact,
                pixels,
                fixed,
                room.SYNTHETIC if canary == "synthetic" else licence,
                embedder=Embedder(artifact, device, getattr(torch, dtype), engine=engine),
                progress=lambda stage, n: bar.update(task, description=stage, advance=n),
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
