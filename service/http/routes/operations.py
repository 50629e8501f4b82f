"""Routes for operators and their tools: health, metrics, limits and the API documentation."""

import asyncio
import platform
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response
from prometheus_client.exposition import choose_encoder

from fullrank import __version__ as VERSION
from service.encoders.served import Served
from service.http.access import authorize_scrape
from service.http.context import service_of
from service.http.errors import Problem, retry
from service.http.routes import schemas, schemas_watching
from service.settings import NONE
from service.watching.peers import Families

router = APIRouter(tags=["operations"])
SWAGGER = Path(str(files("fastapi_offline"))) / "static"
# The page may load from this server only, so nothing it shows can make it call another. Swagger UI has scripts inline.
DOCS_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'self'",
    "Cache-Control": "no-cache",
}


def as_json(value: Any) -> Response:
    """Answer with JSON. NaN becomes null, which means "not known"."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@router.get("/healthz", responses=schemas.example({"status": "alive"}) | schemas.failures(503))
async def healthz(request: Request) -> dict[str, str]:
    """Alive: the event loop answers. 503 once the replica has been unable to embed for FULLRANK_LIVENESS_SECONDS."""
    health = service_of(request).health
    if not health.alive():
        raise Problem(503, "stuck", f"{health.fault() or 'it cannot embed'}; restart it", headers=retry(1))
    return {"status": "alive"}


@router.get(
    "/readyz", responses=schemas.example({"status": "ready"} | schemas.ENCODER | schemas.RUNS) | schemas.failures(503)
)
async def readyz(request: Request) -> dict[str, str]:
    """Ready: weights loaded, warmed, canary passed, not draining. 503 with the reason otherwise.

    A sidecar without an encoder of its own is ready once it can take rows.
    """
    current = service_of(request)
    if (reason := current.unready()) is not None:
        code = "failed" if current.failure else current.phase if current.phase != "ready" else "unfit"
        raise Problem(503, code, reason, headers=retry(1))
    if not current.in_service():
        return {"status": "ready", "role": "sidecar"}
    served = current.current
    runs = {"engine": served.embedder.engine.name, "dtype": current.settings.dtype}
    return {"status": "ready", "model": served.name, "revision": served.revision} | runs


@router.get("/metrics", response_class=Response, responses=schemas_watching.METRICS_RESPONSES)
async def metrics(request: Request) -> Response:
    """Prometheus or OpenMetrics text, as Accept asks; of all replicas where Ray Serve runs them."""
    authorize_scrape(request)
    encoder, media = choose_encoder(request.headers.get("accept", ""))
    service = service_of(request)
    source: Any = service.metrics.registry if service.peers is None else Families(await service.peers.metrics())
    # On a worker thread: writing text must not delay requests.
    return Response(await asyncio.to_thread(encoder, source), headers={"Content-Type": media})


@router.get("/info", response_class=Response, responses=schemas_watching.INFO_RESPONSES)
async def info(request: Request) -> Response:
    """The encoder in service, the limits that hold and the versions that run."""
    current = service_of(request)
    settings = current.settings
    served = None if current.settings.encoder == NONE and current.phase != "starting" else current.current
    card = None if served is None else served.artifact.card
    engine = {name: getattr(settings, name) for name in ("device", "dtype", "threads")}
    limits = (
        "max_batch",
        "max_pending_images",
        "max_images_per_request",
        "max_body_bytes",
        "max_pixels",
        "max_whole_pixels",
        "request_timeout",
    )
    return as_json(
        {
            "version": VERSION,
            "encoder": card and card.model_dump(mode="json", exclude={"files"}) | {"revision": card.revision},
            "encoders": [{"model": it.name, "revision": it.revision} for it in current.in_service()],
            "compared_with": served and baseline_of(served),
            "limits": {name: getattr(settings, name) for name in limits},
            "engine": {"name": served and served.embedder.engine.name} | engine,
            "monitor": {"enabled": settings.monitor, "windows": settings.windows, "block_rows": settings.block_rows},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
    )


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs() -> HTMLResponse:
    """Swagger UI from an installed package: in a closed network there is no CDN."""
    html = get_swagger_ui_html(
        title="fullrank",
        openapi_url="openapi.json",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    return HTMLResponse(html.body, headers=DOCS_HEADERS)


@router.get("/docs/{name}", response_class=FileResponse, include_in_schema=False)
async def docs_asset(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> FileResponse:
    """The script and the style sheet that the page /docs loads."""
    return FileResponse(SWAGGER / name, headers={"Cache-Control": "max-age=86400"})


def baseline_of(served: Served) -> dict[str, str]:
    """Name and revision of the encoder whose reference this one is compared with."""
    return {"model": served.baseline.card.name, "revision": served.baseline.card.revision}
