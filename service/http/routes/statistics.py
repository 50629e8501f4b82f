"""Routes of the monitors: GET /spectrum for everybody, GET /moments and POST /observe with a key."""

import asyncio
import re
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from safetensors.torch import save

from fullrank import SpectrumMonitor
from models.card import NAME
from service.encoders.registry import Service
from service.http import observed
from service.http.access import Observing, Revealing, client_of
from service.http.arrow import ARROW
from service.http.context import context_of, service_of
from service.http.errors import Problem
from service.http.payload import JSON, NPY, apart
from service.http.routes import schemas, schemas_watching
from service.settings import NONE
from service.watching.sidecar import REVISION

router = APIRouter(tags=["statistics"])
revealing = APIRouter(route_class=Revealing)
observing = APIRouter(route_class=Observing)
READERS = {NPY: observed.from_npy, observed.SAFETENSORS: observed.from_safetensors, ARROW: observed.from_arrow}
Model = Annotated[str | None, Query(description="A model known from POST /observe; without it, the served encoder.")]
Window = Annotated[float | None, Query(description="Seconds, one of the setting `windows`; without it, the longest.")]
Packed = Annotated[bool, Query(description="Half the bytes: of the symmetric matrix only the upper triangle.")]
Fleet = Annotated[bool, Query(description="Of all replicas that Ray Serve runs: each one's verdict and the fleet's.")]


@router.get("/spectrum", response_class=Response, responses=schemas_watching.SPECTRUM_RESPONSES)
async def spectrum(request: Request, model: Model = None, fleet: Fleet = False) -> Response:
    """The last snapshot of recent traffic, the reference it is compared with, and the verdict. null: not known."""
    if fleet:
        peers = service_of(request).peers
        if peers is None:
            message = "this replica is not part of a fleet; fleet=1 is for replicas that Ray Serve runs"
            raise Problem(404, "no_fleet", message, field="fleet")
        return Response(orjson.dumps(await peers.spectrum(model)), media_type=JSON)
    return Response(orjson.dumps(spectrum_of(service_of(request), model)), media_type=JSON)


def spectrum_of(service: Service, model: str | None) -> dict[str, Any]:
    """What GET /spectrum answers. Raises Problem 404 or NotFoundError for a model that is not watched."""
    identity, monitor = _monitored(service, model)
    snapshot = monitor.snapshot().to_dict()
    if snapshot["reference"] is None:
        snapshot["verdict"]["reason"] += f"; {_remedy(identity)}"
    return identity | snapshot


@revealing.get(
    "/moments",
    response_class=Response,
    openapi_extra=schemas.KEY,
    responses=schemas_watching.MOMENTS_RESPONSES,
)
async def moments(request: Request, window: Window = None, model: Model = None, packed: Packed = False) -> Response:
    """Exact moments of a window's unit-norm rows (default: the longest), as safetensors of float64.

    `fullrank.Moments.from_tensors` reads them and `merge` adds those of several replicas: the figure of a fleet. The
    file's metadata names model, revision and window, the replica's verdict and reason, and the rows seen since start.
    """
    identity, monitor = _monitored(service_of(request), model)
    seconds = monitor.windows[-1] if window is None else window
    if seconds not in monitor.windows:
        known = ", ".join(f"{it:g}" for it in monitor.windows)
        raise Problem(
            422, "invalid_field", f"window {seconds:g} is not kept; choose one of {known} (s)", field="window"
        )
    metadata = {"model": identity["model"], "revision": identity["revision"], "window": f"{seconds:g}"}
    snapshot = monitor.snapshot()
    metadata |= {"verdict": snapshot.verdict.state, "reason": snapshot.reason}
    metadata |= {"seen": str(sum(monitor.counters.rows.values()))}
    body = await asyncio.to_thread(lambda: save(monitor.moments(seconds).tensors(packed=packed), metadata))
    return Response(body, media_type="application/octet-stream")


@observing.post(
    "/observe",
    status_code=202,
    response_class=Response,
    openapi_extra=schemas_watching.OBSERVE_BODY,
    responses=schemas_watching.OBSERVE_RESPONSES,
)
async def observe(request: Request) -> Response:
    """Watch embeddings made elsewhere: JSON, or safetensors, Arrow or a .npy file of (n, d) floats with ?model=NAME.

    JSON and safetensors may hold `keys` (content hashes), `inputs` (small descriptors of what was embedded; in
    safetensors also `thumbnails`, of which they are made) and `canary` (what the reference's canary images embed to).
    An Arrow stream, which needs the extra `bulk`, has columns `rows`, `keys` and `inputs`.
    They get a monitor, metrics (revision "observed") and a spectrum of their own; the served encoder's are untouched.
    The answer's `watched` is how many rows the monitor got: all, but where several keys post to one model, at most a
    quarter of `monitor_rate` of each.
    """
    service = service_of(request)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    model: Any = request.query_params.get("model")
    if media == JSON:
        model, observation = await apart(len(body), observed.from_json, body)
    elif media in READERS:
        observation = await apart(len(body), READERS[media], body)
    else:
        message = f"Content-Type {media!r} is not understood; send {', '.join(READERS)} or {JSON}"
        raise Problem(415, "unsupported_media_type", message, field="Content-Type")
    if not isinstance(model, str) or not re.fullmatch(NAME, model):
        raise Problem(422, "invalid_field", "model must be a name of letters, digits, '.', '_', '-'", field="model")
    if any(model == served.name for served in service.in_service()):
        message = f"{model} is the encoder this service serves; observe others under another name"
        raise Problem(409, "served_model", message, field="model")
    # Without keys it answers on loopback only, where everybody is one sender.
    sender = client_of(request) if context_of(request.scope).front.grants else 0
    monitor, watched = await service.sidecar.observe(model, observation, sender)
    rows = 0 if observation.rows is None else len(observation.rows)
    if watched < rows:
        monitor.count_unsampled(rows - watched)
        service.metrics.unsampled.inc(rows - watched)
    said = {"model": model, "rows": rows, "watched": watched, "dimension": monitor.dimension}
    return Response(orjson.dumps(said), 202, media_type=JSON)


def _remedy(identity: dict[str, Any]) -> str:
    if identity["revision"] == REVISION:
        model = identity["model"]
        return f"put one in FULLRANK_REFERENCES_DIR as {model}.safetensors, or PUT it to /admin/references/{model}"
    return f"build one with `fullrank reference ENCODER --data DIR`, ENCODER being the folder of {identity['model']}"


def _monitored(service: Service, model: str | None) -> tuple[dict[str, Any], SpectrumMonitor]:
    """The identity of a watched model, and its monitor. Raises Problem 404 or NotFoundError."""
    if model is not None and all(model != served.name for served in service.in_service()):
        return {"model": model, "revision": REVISION, "compared_with": None}, service.sidecar.get(model)
    if model is None and service.settings.encoder == NONE and service.phase != "starting":
        name, monitor = service.sidecar.only()
        return {"model": name, "revision": REVISION, "compared_with": None}, monitor
    served = service.served(model)
    if served.monitor is None:
        raise Problem(404, "not_monitored", "the monitor is off; set FULLRANK_MONITOR=true")
    baseline = served.baseline.card
    compared = {"model": baseline.name, "revision": baseline.revision}
    return {"model": served.name, "revision": served.revision, "compared_with": compared}, served.monitor


router.include_router(revealing)
router.include_router(observing)
