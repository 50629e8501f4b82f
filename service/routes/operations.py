"""Health, metrics, limits, the spectrum, the page: what operators and their tools read."""

import platform
from pathlib import Path
from typing import Any

import orjson
import torch
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client.exposition import choose_encoder

import service.page
from service.access import service_of
from service.core import Served, retry
from service.errors import Problem
from service.routes import schemas
from service.version import VERSION

router = APIRouter(tags=["operations"])
PAGE = (Path(service.page.__file__).parent / "index.html").read_text()
# The page is one file and asks this server only; nothing it shows can make it ask another.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'self'",
    "Cache-Control": "no-cache",
}


def as_json(value: Any) -> Response:
    """JSON; NaN becomes null, which here means "not known"."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@router.get("/healthz", responses=schemas.example({"status": "alive"}))
async def healthz() -> dict[str, str]:
    """Alive: the event loop answers."""
    return {"status": "alive"}


@router.get("/readyz", responses=schemas.example({"status": "ready"} | schemas.ENCODER) | schemas.failures(503))
async def readyz(request: Request) -> dict[str, str]:
    """Ready: weights loaded, warmed, canary passed, not draining. 503 with the reason otherwise."""
    current = service_of(request)
    if current.phase != "ready":
        reason = current.failure or f"the service is {current.phase}"
        raise Problem(503, "failed" if current.failure else current.phase, reason, headers=retry(1))
    return {"status": "ready", "model": current.current.name, "revision": current.current.revision}


@router.get("/metrics", response_class=Response, responses=schemas.METRICS_RESPONSES)
def metrics(request: Request) -> Response:
    """Prometheus or OpenMetrics text, as Accept asks. On a worker thread: writing text must not delay requests."""
    encoder, media = choose_encoder(request.headers.get("accept", ""))
    return Response(encoder(service_of(request).metrics.registry), headers={"Content-Type": media})


@router.get("/info", response_class=Response, responses=schemas.INFO_RESPONSES)
async def info(request: Request) -> Response:
    """The encoder in service, the limits that hold and the versions that run."""
    current = service_of(request)
    settings, served = current.settings, current.current
    card = served.artifact.card
    limits = (
        "max_batch",
        "max_pending_images",
        "max_images_per_request",
        "max_body_bytes",
        "max_pixels",
        "request_timeout",
    )
    return as_json(
        {
            "version": VERSION,
            "encoder": card.model_dump(mode="json", exclude={"files"}) | {"revision": card.revision},
            "encoders": [{"model": it.name, "revision": it.revision} for it in current.in_service()],
            "compared_with": named(served),
            "limits": {name: getattr(settings, name) for name in limits},
            "engine": {"device": settings.device, "dtype": settings.dtype, "threads": settings.threads},
            "monitor": {"enabled": settings.monitor, "windows": settings.windows, "block_rows": settings.block_rows},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
    )


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """The live spectrum."""
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)


def named(served: Served) -> dict[str, str]:
    """Whose health this encoder's is compared with."""
    return {"model": served.baseline.card.name, "revision": served.baseline.card.revision}
