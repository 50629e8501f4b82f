"""fullrank check."""

from pathlib import Path
from typing import Annotated

import typer

from cli.common import AsJson, Device, Dtype, Engine, fail, printed, usable_output, worded


def check(
    encoder: Annotated[Path, typer.Argument(help="The candidate's folder.")],
    against: Annotated[Path | None, typer.Option(help="The incumbent's folder; without it, absolute floors.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the judgement as JUnit XML, for CI.")] = None,
    device: Device = "cpu",
    engine: Engine = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Judge an encoder before it is deployed: refuse a collapsed or damaged one, and say which directions died.

    Exit code 0: it may serve. 1: it is collapsed, damaged or cannot be read. 2: the command was not understood.

    Example: fullrank check models/pretrained/fashion-byol --against models/pretrained/fashion-directclr
    """
    if junit:
        usable_output(junit, "--junit")
    from dataclasses import asdict

    import torch

    from models.artifact import ArtifactError, load
    from models.embedder import Embedder
    from models.gate import Judgement, hold_to_float32, judge
    from models.junit import junit as report_of

    try:
        candidate = load(encoder)
        incumbent = load(against) if against else None
        embedder = Embedder(candidate, device, getattr(torch, dtype), engine=engine)
        hold_to_float32(embedder, candidate)
        judgement = judge(embedder, candidate, incumbent)
    except (ArtifactError, ValueError) as error:
        judgement = Judgement(False, str(error))
    if junit:
        try:
            junit.write_bytes(report_of(encoder.name, judgement))
        except OSError as error:
            fail(f"--junit: {worded(error)}", 2)
    if as_json:
        printed(asdict(judgement), "", as_json)
    elif not judgement.checks:
        fail(judgement.reason)
    else:
        typer.echo(f"{'pass' if judgement.passed else 'FAIL'}  {candidate.card.name}: {judgement.reason}")
    raise typer.Exit(0 if judgement.passed else 1)
