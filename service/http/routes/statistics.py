"""Routes of the monitors: GET /spectrum for everybody, GET /moments and POST /observe with a key."""

import asyncio
import io
import math
import re
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from safetensors.torch import save

from fullrank import SpectrumMonitor
from service.encoders.registry import Service
from service.http.access import Observing, Revealing
from service.http.context import service_of
from service.http.errors import Problem
from service.http.payload import JSON, NPY, apart, json_object
from service.http.routes import schemas
from service.watching.sidecar import REVISION

router = APIRouter(tags=["statistics"])
revealing = APIRouter(route_class=Revealing)
observing = APIRouter(route_class=Observing)
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_DIMENSION = 2048  # a monitor holds dozens of d x d matrices
Model = Annotated[str | None, Query(description="A model known from POST /observe; without it, the served encoder.")]
Packed = Annotated[bool, Query(description="Half the bytes: of the symmetric matrix only the upper triangle.")]
Fleet = Annotated[bool, Query(description="Of all replicas that Ray Serve runs: each one's verdict and the fleet's.")]


@router.get("/spectrum", response_class=Response, responses=schemas.SPECTRUM_RESPONSES)
async def spectrum(request: Request, model: Model = None, fleet: Fleet = False) -> Response:
    """The last snapshot of recent traffic, the reference it is compared with, and the verdict. null: not known."""
    if fleet:
        peers = service_of(request).peers
        if peers is None:
            message = "this replica is not part of a fleet; fleet=1 is for replicas that Ray Serve runs"
            raise Problem(404, "no_fleet", message, field="fleet")
        return Response(orjson.dumps(await peers.spectrum(model)), media_type=JSON)
    identity, monitor = _monitored(service_of(request), model)
    snapshot = monitor.snapshot().to_dict()
    if snapshot["reference"] is None:
        snapshot["verdict"]["reason"] += f"; {_remedy(identity)}"
    return Response(orjson.dumps(identity | snapshot), media_type=JSON)


@revealing.get(
    "/moments",
    response_class=Response,
    openapi_extra=schemas.KEY,
    responses=schemas.MOMENTS_RESPONSES,
)
async def moments(
    request: Request, window: float | None = None, model: Model = None, packed: Packed = False
) -> Response:
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
    verdict = monitor.snapshot().verdict
    metadata |= {"verdict": verdict.state, "reason": verdict.reason, "seen": str(sum(monitor.counters.rows.values()))}
    body = await asyncio.to_thread(lambda: save(monitor.moments(seconds).tensors(packed=packed), metadata))
    return Response(body, media_type="application/octet-stream")


@observing.post(
    "/observe",
    status_code=202,
    response_class=Response,
    openapi_extra=schemas.OBSERVE_BODY,
    responses=schemas.OBSERVE_RESPONSES,
)
async def observe(request: Request) -> Response:
    """Watch embeddings made elsewhere: JSON {"model", "rows"}, or a .npy file of (n, d) floats with ?model=NAME.

    They get a monitor, metrics (revision "observed") and a spectrum of their own; the served encoder's are untouched.
    """
    service = service_of(request)
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if media == NPY:
        model = request.query_params.get("model")
        rows = await apart(len(body), _from_npy, body)
    elif media == JSON:
        model, rows = await apart(len(body), _from_json, body)
    else:
        message = f"Content-Type {media!r} is not understood; send {NPY} or {JSON}"
        raise Problem(415, "unsupported_media_type", message, field="Content-Type")
    if not isinstance(model, str) or not re.fullmatch(NAME, model):
        raise Problem(422, "invalid_field", "model must be a name of letters, digits, '.', '_', '-'", field="model")
    if any(model == served.name for served in service.in_service()):
        message = f"{model} is the encoder this service serves; observe others under another name"
        raise Problem(409, "served_model", message, field="model")
    await service.sidecar.observe(model, rows)
    return Response(orjson.dumps({"model": model, "rows": len(rows), "dimension": rows.shape[1]}), 202, media_type=JSON)


def _remedy(identity: dict[str, Any]) -> str:
    if identity["revision"] == REVISION:
        return f"put one in FULLRANK_REFERENCES_DIR as {identity['model']}.safetensors"
    return f"build one with `fullrank reference ENCODER --data DIR`, ENCODER being the folder of {identity['model']}"


def _monitored(service: Service, model: str | None) -> tuple[dict[str, Any], SpectrumMonitor]:
    """The identity of a watched model, and its monitor. Raises Problem 404 or NotFoundError."""
    if model is not None and all(model != served.name for served in service.in_service()):
        return {"model": model, "revision": REVISION, "compared_with": None}, service.sidecar.get(model)
    served = service.served(model)
    if served.monitor is None:
        raise Problem(404, "not_monitored", "the monitor is off; set FULLRANK_MONITOR=true")
    baseline = served.baseline.card
    compared = {"model": baseline.name, "revision": baseline.revision}
    return {"model": served.name, "revision": served.revision, "compared_with": compared}, served.monitor


def _from_json(body: bytes) -> tuple[Any, NDArray[np.float32]]:
    value = json_object(body)
    if value.keys() != {"model", "rows"}:
        raise Problem(422, "invalid_field", 'the body must be {"model": name, "rows": [[...], ...]}', field="body")
    if not isinstance(value["rows"], list) or not all(isinstance(row, list) for row in value["rows"]):
        raise Problem(422, "invalid_field", "rows must be a list of lists of numbers", field="rows")
    for index, row in enumerate(value["rows"]):
        if not set(map(type, row)) <= {int, float}:
            message = f"rows[{index}] holds something that is no number; leave out rows that have none"
            raise Problem(422, "invalid_field", message, field=f"rows[{index}]")
    try:
        # Values that overflow become infinite and are counted as not finite, so numpy need not warn in the log.
        with np.errstate(over="ignore"):
            rows = np.array(value["rows"], np.float32)
    except (ValueError, TypeError) as error:
        raise Problem(
            422, "invalid_field", f"rows must be lists of numbers of one length: {error}", field="rows"
        ) from error
    return value["model"], _checked(rows)


def _from_npy(body: bytes) -> NDArray[np.float32]:
    """Read a .npy file of floats, without pickle and without allocating more than the bytes received."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    # numpy parses the header with Python's own parser, which may raise many kinds of exceptions.
    except Exception as error:
        message = "the body is no .npy file whose header can be read; send what numpy.save writes"
        raise Problem(422, "invalid_field", message, field="body") from error
    data = body[file.tell() :]
    # A header may also declare a dimension of -1 or True.
    sane = all(type(side) is int and side >= 0 for side in shape)
    if dtype.kind != "f" or fortran or not sane or math.prod(shape) * dtype.itemsize != len(data):
        message = f"expected C-ordered floats filling the file; its header says {dtype} {shape}"
        raise Problem(422, "invalid_field", message, field="body")
    with np.errstate(over="ignore"):
        return _checked(np.frombuffer(data, dtype).reshape(shape).astype(np.float32))


def _checked(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    if rows.ndim != 2 or not 2 <= rows.shape[1] <= MAX_DIMENSION or not len(rows):
        message = f"rows must be (n, d) with n >= 1 and 2 <= d <= {MAX_DIMENSION}, not of shape {rows.shape}"
        raise Problem(422, "invalid_field", message, field="rows")
    return rows


router.include_router(revealing)
router.include_router(observing)
