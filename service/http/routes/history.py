"""Routes that the live page reads: GET /history once, or again and again, and GET /events as a stream of the same."""

import math
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from service.encoders.registry import Service
from service.failures import ServiceError
from service.http.context import service_of
from service.http.errors import Problem, retry
from service.http.payload import JSON
from service.http.routes import schemas_watching
from service.http.routes.statistics import spectrum_of
from service.watching.sidecar import REVISION

router = APIRouter(tags=["statistics"])
PERIOD = 2.0  # seconds between two messages of a stream
RECONNECT = 2000  # milliseconds after which a browser whose stream ended asks again
Since = Annotated[float, Query(description="Unix seconds: only what came later; 0: all that is kept, 24 hours.")]
Model = Annotated[str | None, Query(description="A model of the answer's `encoders`; the default encoder without it.")]


def encode(value: Any) -> bytes:
    """JSON; NaN becomes null, which means "not known"."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


@router.get("/history", response_class=Response, responses=schemas_watching.HISTORY_RESPONSES)
async def history(request: Request, model: Model = None, since: Since = 0.0) -> Response:
    """All models watched with their verdicts, and what was kept of one of them and of the replica's traffic.

    Points come every 15 seconds; of those older than 90 minutes the worst of each 2 minutes is kept. `spectrum` is
    log10 of the eigenvalue at each of `ranks`; `bands` is log10 of the energy, as a ratio to the reference, of the band
    of its directions that holds that rank.
    """
    return Response(encode(update(service_of(request), model, _sane(since))), media_type=JSON)


@router.get("/events", response_class=StreamingResponse, responses=schemas_watching.EVENTS_RESPONSES)
async def events(request: Request, model: Model = None, since: Since = 0.0) -> StreamingResponse:
    """Server-sent events, every 2 seconds: `update`, as GET /history answers, and `spectrum` when there is a new one.

    At most 32 may listen at once. The stream ends when the service does.
    """
    service = service_of(request)
    first = update(service, model, _sane(since))
    if service.listeners.ended:
        raise Problem(503, "draining", "this replica is shutting down", headers=retry(1))
    if service.listeners.full:
        message = f"{service.listeners.limit} clients listen already, the limit; poll GET /history instead"
        raise Problem(429, "too_many_listeners", message, headers=retry(30))
    lines = b"" if request.scope.get("fullrank.head") else _stream(service, first)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if isinstance(lines, bytes):
        return StreamingResponse(iter((lines,)), media_type="text/event-stream", headers=headers)
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _stream(service: Service, document: dict[str, Any]) -> AsyncIterator[bytes]:
    """Messages for one listener. Nothing is queued: what a slow one does not read is not made."""
    model = document["model"]
    shown: Any = None
    with service.listeners.listening():
        yield b"retry: %d\n\n" % RECONNECT
        while True:
            yield _message("update", document)
            if (spectrum := _spectrum(service, model)) is not None and spectrum["timestamp"] != shown:
                shown = spectrum["timestamp"]
                yield _message("spectrum", spectrum)
            del spectrum
            since = document["until"]
            if not await service.listeners.pause(PERIOD):
                return
            # A listener to the default encoder goes on with the one that replaces it.
            model = document["model"]
            if document["default"] and service.in_service():
                model = service.current.name
            try:
                document = update(service, model, since)
            except Problem:  # it was replaced: the answer has begun, so who asks again is told
                return


def _message(event: str, value: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event.encode(), encode(value))


def _spectrum(service: Service, model: str | None) -> dict[str, Any] | None:
    """What GET /spectrum answers, or None where it refuses."""
    try:
        return None if model is None else spectrum_of(service, model)
    except (ServiceError, Problem):
        return None


def update(service: Service, model: str | None, since: float) -> dict[str, Any]:
    """The state of the service, all models, and what happened to one of them after `since`.

    Raises Problem 404 for a model of which nothing is known.
    """
    models = _models(service)
    chosen = next((it for it in models if it["model"] == model), None) if model else next(iter(models), None)
    if model and chosen is None and service.phase != "starting":
        raise Problem(404, "no_such_model", f"no model {model!r} is watched, and none was for a day", field="model")
    name, observed = (chosen["model"], chosen["observed"]) if chosen else (None, False)
    kept = None if name is None else service.history.of(name, observed, since)
    return {
        "time": time.time(),
        "phase": service.phase,
        "fault": service.unready(),
        "default": bool(chosen and models and chosen is models[0] and not observed),
        "encoders": models,
        "fleet": service.peers is not None,
        "model": name,
        "observed": observed,
        "history": kept,
        "traffic": service.history.traffic(since) | {"limit": service.settings.max_pending_images},
        "until": service.history.latest if math.isfinite(service.history.latest) else since,
    }


def _models(service: Service) -> list[dict[str, Any]]:
    """All models: in service, the default first; observed by POST /observe; known from before and watched no more."""
    models: dict[tuple[str, bool], dict[str, Any]] = {}
    for served in service.in_service():
        entry = {"model": served.name, "revision": served.revision, "observed": False, "watched": False, "gone": False}
        models[served.name, False] = entry | {"state": None, "reason": "the monitor is off", "rows": 0}
    for model, revision, monitor in service.monitors():
        snapshot = monitor.snapshot()
        window = snapshot.windows[min(snapshot.windows)]
        entry = {"model": model, "revision": revision, "observed": revision == REVISION, "watched": True}
        entry |= {"gone": False}
        entry |= {"state": snapshot.verdict.state, "reason": snapshot.reason, "rows": window.rows}
        models[model, revision == REVISION] = entry
    for track in service.history.models():
        if (track.model, track.observed) not in models:
            entry = {"model": track.model, "revision": track.identity.partition("@")[2], "observed": track.observed}
            entry |= {"watched": False, "gone": True, "state": None, "rows": 0}
            entry |= {"reason": "no rows came since the service started, or for as long as the longest window"}
            models[track.model, track.observed] = entry
    return list(models.values())


def _sane(since: float) -> float:
    if not math.isfinite(since):
        raise Problem(422, "invalid_field", "since must be a finite number of Unix seconds", field="since")
    return since
