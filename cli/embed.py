"""fullrank embed."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import _bulk
from cli.common import AsJson, Device, Dtype, Engine, errors, fail, printed, usable_output, worded, write

if TYPE_CHECKING:
    import numpy as np

    # A file's row, or the reason why it has none.
    Results = list[np.ndarray | str]


def embed(
    sources: Annotated[
        list[str],
        typer.Argument(help="Image files; or, with --out DIR, one folder, .tar, .parquet, or .txt file of paths."),
    ],
    encoder: Annotated[Path | None, typer.Option(help="Embed here, with the encoder in this folder.")] = None,
    url: Annotated[str | None, typer.Option(help="Embed there: the address of a running service.")] = None,
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The service's key.")] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    dtype: Dtype = "float32",
    out: Annotated[
        str | None,
        typer.Option(
            help="Write FILE.npy, and FILE.txt with the names of its rows; or one file a shard into a folder, which "
            "may be an address in object storage, such as s3://bucket/rows."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that embed into a folder, one thread each.", show_default="1; with --ray one a CPU"
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Embed into a folder on the Ray cluster at HOST:PORT, ray://HOST:PORT, auto (the one that runs here) "
            "or local (one started for this). All nodes see the encoder, the source and --out under the same paths."
        ),
    ] = None,
    file_format: Annotated[
        Literal["parquet", "npy"],
        typer.Option("--format", help="What a folder gets: Parquet files, or .npy files each with a .jsonl of ids."),
    ] = "parquet",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Also build a reference of the whole folder of rows, calibrated on it. The encoder with it goes to "
            "this folder; or to NAME.safetensors the reference alone, for rows that others POST to /observe."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed images, here or by a running service, by the same path; rows are L2-normalised.

    A bad image does not stop the others: it is named, and the exit code is 1. Into a folder the run is resumed by the
    same command: what is complete is skipped.

    Example: fullrank embed examples/ankle-boot.png --url http://127.0.0.1:8000

    Example: fullrank embed photos/ --encoder models/pretrained/fashion-directclr --out rows/ --processes 2

    Example: fullrank embed photos/ --encoder models/pretrained/fashion-directclr --out rows/ --ray 10.0.0.7:6379
    """
    if (url is None) == (encoder is None):
        fail("give either --encoder or --url", 2)
    for option, name in (("--out", out if out and out.endswith(".npy") else None), ("--reference", reference)):
        if name is not None and re.match(r"[a-z][a-z0-9+]*:/", str(name)):
            fail(
                f"{option} {name}: one file is written to this machine only; --out may be a folder in object storage", 2
            )
    if out is not None and not out.endswith(".npy"):
        if encoder is None or len(sources) != 1:
            fail(f"--out {out} is a folder: give one source and --encoder; for images of a service name a .npy file", 2)
        how = _bulk.How(device, engine, dtype, processes, ray)
        _bulk.embed_folder(sources[0], encoder, out, how, file_format, reference, as_json)
        return
    for option, value in (("--ray", ray), ("--reference", reference), ("--processes", processes)):
        if value is not None:
            fail(f"{option} needs a folder of rows: name one with --out", 2)
    if out is not None:
        usable_output(Path(out), "--out")
    files = [Path(source) for source in sources]
    results = _embed_here(files, encoder, device, engine, dtype) if encoder else _embed_there(files, url or "", key)
    _put(files, results, None if out is None else Path(out), as_json)


def _put(files: list[Path], results: "Results", out: Path | None, as_json: bool) -> None:
    """Write the rows and print the errors. Exit code 1 if there are any errors."""
    import numpy as np

    bad = {file: it for file, it in zip(files, results, strict=True) if isinstance(it, str)}
    good = [(file, it) for file, it in zip(files, results, strict=True) if not isinstance(it, str)]
    if out is None:
        for file, it in zip(files, results, strict=True):
            value = {"error": it} if isinstance(it, str) else {"embedding": it.tolist()}
            typer.echo(json.dumps({"file": str(file), **value}))
    elif good:
        content = io.BytesIO()
        np.save(content, np.stack([row for _, row in good]))
        names = "".join(f"{file}\n" for file, _ in good)
        write(out.with_suffix(".txt"), os.fsencode(names), "--out")  # the names' own bytes, which need not be UTF-8
        write(out, content.getvalue(), "--out")
    if out is not None and as_json:
        failed = {str(file): reason for file, reason in bad.items()}
        printed({"out": str(out) if good else None, "rows": len(good), "failed": failed}, "", as_json)
    for file, reason in bad.items():
        errors.print(f"fullrank: {reason if str(file) in reason else f'{file}: {reason}'}", style="red", soft_wrap=True)
    if bad:
        errors.print(f"fullrank: {len(bad)} of {len(files)} images have no embedding", style="red")
        raise typer.Exit(1)


def _embed_there(files: list[Path], url: str, key: str | None) -> "Results":
    try:
        from fullrank.client import Client, EmbeddingError
    except ImportError as error:
        fail(error)
    try:
        with Client(url, key=key, progress=sys.stderr.isatty()) as client:
            try:
                return list(client.embed(files))
            except (EmbeddingError, OSError) as error:
                if len(files) == 1:
                    return [worded(error)]
            # One image is bad: send each alone, so that the others are embedded.
            results: Results = []
            for file in files:
                try:
                    results.extend(client.embed([file]))
                except (EmbeddingError, OSError) as error:
                    results.append(worded(error))
            return results
    except (EmbeddingError, ValueError, OSError) as error:
        fail(error)


def _embed_here(files: list[Path], encoder: Path, device: str, engine: Engine, dtype: Dtype) -> "Results":
    import numpy as np
    import torch

    from models.artifact import ArtifactError, load
    from models.decode import ImageError
    from models.embedder import Embedder, faulty, normalize
    from models.gate import hold_to_float32
    from models.preprocess import decode

    try:
        artifact = load(encoder)
        embedder = Embedder(artifact, device, getattr(torch, dtype), engine=engine)
        hold_to_float32(embedder, artifact)
    except (ArtifactError, OSError) as error:
        fail(error)
    results: Results = [""] * len(files)
    prepared = []
    for index, file in enumerate(files):
        try:
            prepared.append((index, decode(file.read_bytes(), embedder.card.preprocessing)))
        except IsADirectoryError:
            results[index] = f"{file} is a folder; embed it with --out DIR, which writes one file a shard"
        except (ImageError, OSError) as error:
            results[index] = worded(error)
    if prepared:
        rows = embedder.embed(np.stack([pixels for _, pixels in prepared]))
        units = normalize(rows).numpy()
        for (index, _), unit, bad in zip(prepared, units, faulty(rows).tolist(), strict=True):
            reason = f"{encoder} gives no embedding (not finite, or all zero) for this image"
            results[index] = reason if bad else unit
    return results
