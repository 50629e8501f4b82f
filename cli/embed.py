"""fullrank embed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.common import Device, Engine, fail


def embed(
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    encoder: Annotated[Path | None, typer.Option(help="Embed here, with the encoder in this folder.")] = None,
    url: Annotated[str | None, typer.Option(help="Embed there: the address of a running service.")] = None,
    key: Annotated[str | None, typer.Option(envvar="FULLRANK_API_KEY", help="The service's key.")] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    out: Annotated[Path | None, typer.Option(help="Write an .npy file instead of JSON lines.")] = None,
) -> None:
    """Embed image files, here or by a running service, by the same path; rows are L2-normalised.

    Example: fullrank embed examples/ankle-boot.png --url http://127.0.0.1:8000
    """
    import numpy as np

    if url is not None and encoder is None:
        rows = _embed_there(files, url, key)
    elif encoder is not None and url is None:
        rows = _embed_here(files, encoder, device, engine)
    else:
        fail("give either --encoder or --url", 2)
    if out:
        try:
            np.save(out, rows)
        except OSError as error:
            fail(f"--out: {error}")
        return
    for path, row in zip(files, rows, strict=True):
        typer.echo(json.dumps({"file": str(path), "embedding": row.tolist()}))


def _embed_there(files: list[Path], url: str, key: str | None) -> Any:
    try:
        from fullrank.client import Client, EmbeddingError
    except ImportError as error:
        fail(error)
    try:
        with Client(url, key=key, progress=sys.stderr.isatty()) as client:
            return client.embed(files)
    except (EmbeddingError, OSError) as error:
        fail(error)


def _embed_here(files: list[Path], encoder: Path, device: str, engine: Engine) -> Any:
    from models.artifact import ArtifactError, load
    from models.decode import ImageError
    from models.embedder import Embedder, faulty, normalize

    try:
        rows = Embedder(load(encoder), device, engine=engine).embed_files(files)
    except (ArtifactError, ImageError, OSError) as error:
        fail(error)
    if (bad := faulty(rows)).any():
        names = ", ".join(str(file) for file, it in zip(files, bad.tolist(), strict=True) if it)
        fail(f"{encoder} gives no embedding (not finite, or all zero) for {names}")
    return normalize(rows).numpy()
