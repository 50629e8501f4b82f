"""fullrank doctor."""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cli.common import AsJson, console, printed, worded

if TYPE_CHECKING:
    from service.settings import Settings

EXTRAS = {"matplotlib": "train", "tensorboard": "train", "opentelemetry": "tracing"}
IMAGES = 64  # images that are embedded for an estimate of the speed


@dataclass(frozen=True)
class Finding:
    """The result of one check: ok, note (works, but you should know this) or fail, with words that give the remedy."""

    check: str
    state: str
    says: str


def doctor(
    encoder: Annotated[Path | None, typer.Option(help="An encoder's folder.", show_default="the one served")] = None,
    prometheus: Annotated[str | None, typer.Option(help="Address of a Prometheus that should scrape this.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine can serve: settings, device, threads, port, folders, encoder, engine, Prometheus.

    It reads the same FULLRANK_ variables as `fullrank serve`, and changes nothing. Exit code 1: something fails.

    Example: fullrank doctor --prometheus http://127.0.0.1:9090
    """
    found = list(examine(encoder, prometheus))
    if as_json:
        printed([asdict(it) for it in found], "", as_json)
    else:
        table = Table("", "check", "", show_header=False)
        for it in found:
            table.add_row(it.state, it.check, it.says)
        console.print(table)
    raise typer.Exit(int(any(it.state == "fail" for it in found)))


def examine(encoder: Path | None, prometheus: str | None) -> Iterator[Finding]:
    """Run all checks, in the order in which `fullrank serve` would meet the problems."""
    from importlib.util import find_spec

    import torch
    from pydantic import ValidationError

    from fullrank import __version__
    from service.settings import Settings

    yield Finding(
        "versions", "ok", f"fullrank {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            yield Finding(module, "note", f"not installed; what needs it: pip install 'fullrank-server[{extra}]'")
    try:
        settings = Settings(**({"encoder": encoder} if encoder else {}))  # type: ignore[arg-type]
    except ValidationError as error:
        for it in error.errors():
            yield Finding("settings", "fail", f"{'.'.join(map(str, it['loc']))}: {it['msg']}")
        return
    yield device(settings)
    yield threads(settings)
    yield port(settings)
    if settings.state_dir is not None:
        yield writable(settings.state_dir)
    yield from sound(settings)
    if prometheus:
        yield scraped(prometheus.rstrip("/"))


def device(settings: "Settings") -> Finding:
    """Check that torch computes on the device in the precision of the settings."""
    import torch

    from models.processor import emulates_bfloat16

    dtype = getattr(torch, settings.dtype)
    try:
        square = torch.ones(8, 8, device=settings.device, dtype=dtype) @ torch.ones(
            8, 8, device=settings.device, dtype=dtype
        )
        works = float(square.sum()) == 512
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        return Finding(
            "device", "fail", f"{settings.device} in {settings.dtype}: {reason}; FULLRANK_DEVICE=cpu always works"
        )
    if settings.device == "cpu" and settings.dtype == "bfloat16" and emulates_bfloat16():
        words = "cpu emulates bfloat16 (it has neither AMX nor AVX512-BF16)"
        return Finding("device", "note", f"{words}: FULLRANK_DTYPE=float32 is faster here")
    name = torch.cuda.get_device_name(settings.device) if settings.device.startswith("cuda") else platform.machine()
    return Finding("device", "ok" if works else "fail", f"{settings.device} ({name}) computes in {settings.dtype}")


def threads(settings: "Settings") -> Finding:
    """Check that a forward pass has no more threads than the process has cores."""
    from service.settings import available_cpus

    cores = available_cpus()
    words = f"{settings.threads} for a forward pass, {settings.decode_threads} for decoding, on {cores} cores"
    if settings.threads > cores:
        return Finding("threads", "note", f"{words}: threads would wait for each other; FULLRANK_THREADS={cores}")
    return Finding("threads", "ok", words)


def port(settings: "Settings") -> Finding:
    """Check that the service can listen on its port."""
    from service.http.app import unheard

    reason = unheard(settings)
    return Finding("port", "fail" if reason else "ok", reason or f"{settings.host}:{settings.port} is free")


def writable(folder: Path) -> Finding:
    """Check that the monitors' windows can be stored in a folder."""
    there = next(it for it in (folder, *folder.resolve().parents) if it.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return Finding("state_dir", "ok", f"{folder} can be written")
    return Finding("state_dir", "fail", f"{folder} cannot be written by user {os.getuid()}; set FULLRANK_STATE_DIR")


def sound(settings: "Settings") -> Iterator[Finding]:
    """Check that the encoder loads, runs, passes the gate, and has a reference and a canary."""
    import numpy as np
    import torch

    from models.artifact import ArtifactError, load
    from models.embedder import Embedder
    from models.gate import judge
    from service.settings import NONE

    if settings.encoder == NONE:
        yield Finding("encoder", "ok", "none: a sidecar, which takes rows at POST /observe")
        return
    try:
        artifact = load(settings.encoder)
        options: dict[str, Any] = {"engine": settings.engine, "threads": settings.threads}
        embedder = Embedder(artifact, settings.device, getattr(torch, settings.dtype), **options)
        judgement = judge(embedder, artifact, None)
    except (ArtifactError, ValueError, RuntimeError, OSError) as error:
        yield Finding("encoder", "fail", f"{settings.encoder}: {error}")
        return
    preprocessing = artifact.card.preprocessing
    shape = (IMAGES, preprocessing.channels, preprocessing.size, preprocessing.size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    embedder.embed(pixels)
    started = time.perf_counter()
    embedder.embed(pixels)
    rate = IMAGES / (time.perf_counter() - started)
    name = f"{artifact.card.name} {artifact.card.revision}"
    yield Finding("encoder", "ok" if judgement.passed else "fail", f"{name}: {judgement.reason}")
    wanted = "" if settings.engine in ("auto", embedder.engine.name) else f", where {settings.engine} was asked for"
    yield Finding("engine", "note" if wanted else "ok", f"{embedder.runs_in}{wanted}")
    yield Finding("speed", "ok", f"about {rate:.0f} images a second now, decoding not counted")
    if artifact.reference is None:
        yield Finding("reference", "note", "none, so nothing can be judged: fullrank reference ENCODER --data DIR")
    elif artifact.reference.shortfall:  # no verdict on it will ever be healthy
        yield Finding("reference", "note", artifact.reference.shortfall)
    elif artifact.reference.calibration is None:
        yield Finding("reference", "note", "not calibrated, so general thresholds hold; give it 1,024 images or more")
    else:
        yield Finding("reference", "ok", f"{artifact.reference.rows} rows, calibrated")
    if artifact.canary is None:
        yield Finding("canary", "note", "none, so a broken model looks like unusual traffic: fullrank reference")


def scraped(url: str) -> Finding:
    """Check that a Prometheus scrapes replicas and has our alert rules."""
    import httpx

    try:
        answer = httpx.get(f"{url}/api/v1/query", params={"query": 'sum(up{job=~"(.+/)?fullrank"})'}, timeout=10)
        result = answer.raise_for_status().json()["data"]["result"]
        groups = httpx.get(f"{url}/api/v1/rules", timeout=10).raise_for_status().json()["data"]["groups"]
        rules = sum(rule.get("name", "").startswith("Embedding") for group in groups for rule in group["rules"])
        replicas = int(float(result[0]["value"][1])) if result else 0
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding("prometheus", "fail", f"{url}: {worded(error)}")
    except (ValueError, TypeError, LookupError, AttributeError):
        return Finding("prometheus", "fail", f"{url}: its answers are not those of a Prometheus; is this its address?")
    if not rules:
        return Finding("prometheus", "fail", f"{url} has no rules of ours: fullrank rules DIR writes them")
    if not replicas:
        return Finding("prometheus", "note", f'{url} has {rules} alerts, and scrapes no replica under job="fullrank"')
    return Finding("prometheus", "ok", f"{url} scrapes {replicas} replicas and has {rules} alerts")
