"""Route POST /neighbours: the canary images whose embeddings are nearest to one embedding."""

import base64
import io
import math
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from PIL import Image

from models.artifact import Canary
from models.embedder import normalize
from service.http.access import Revealing
from service.http.context import service_of
from service.http.errors import Problem
from service.http.payload import JSON, apart, json_object
from service.http.routes import schemas_watching

router = APIRouter(tags=["statistics"], route_class=Revealing)
MOST = 32
WIDE = 96  # pixels of the longer side of a picture in an answer, at most


@router.post(
    "/neighbours",
    response_class=Response,
    openapi_extra=schemas_watching.NEIGHBOURS_BODY,
    responses=schemas_watching.NEIGHBOURS_RESPONSES,
)
async def neighbours(request: Request) -> Response:
    """The canary images nearest to `embedding`, by cosine, the nearest first. The images may be private, hence the key.

    The cosines are with the embeddings that are stored in the artifact.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != JSON:
        message = f"Content-Type {media!r} is not understood; send {JSON}"
        raise Problem(415, "unsupported_media_type", message, field="Content-Type")
    body = await request.body()
    asked = await apart(len(body), json_object, body)
    if unknown := asked.keys() - {"embedding", "model", "count"}:
        raise Problem(422, "invalid_field", "the body has embedding, model and count only", field=min(unknown))
    model = asked.get("model")
    if model is not None and not isinstance(model, str):
        raise Problem(422, "invalid_field", "model must be the name of an encoder in service", field="model")
    served = service_of(request).served(model)
    count = asked.get("count", 6)
    if type(count) is not int or not 1 <= count <= MOST:
        raise Problem(422, "invalid_field", f"count must be a whole number from 1 to {MOST}", field="count")
    row = _row(asked.get("embedding"), served.artifact.card.dimension)
    canary = served.artifact.canary
    found = [] if canary is None else await apart(canary.embeddings.nbytes, _nearest, canary, row, count)
    answer = {"model": served.name, "revision": served.revision, "canary": len(canary.images) if canary else 0}
    return Response(orjson.dumps(answer | {"neighbours": found}), media_type=JSON)


def _row(value: Any, dimension: int) -> NDArray[np.float64]:
    """One finite row of this dimension that is not all zero. Raises Problem 422."""
    numbers = isinstance(value, list) and set(map(type, value)) <= {int, float}
    row = np.array(value, np.float64) if numbers else np.zeros(0)
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(row))
    if row.shape != (dimension,) or not math.isfinite(norm) or norm == 0:
        message = f"embedding must be a list of {dimension} finite numbers that are not all 0, as POST /embed answers"
        raise Problem(422, "invalid_field", message, field="embedding")
    return row / norm


def _nearest(canary: Canary, row: NDArray[np.float64], count: int) -> list[dict[str, Any]]:
    cosines = normalize(canary.embeddings.double()).numpy() @ row
    order = np.argsort(-cosines, kind="stable")[:count]
    return [{"index": int(i), "cosine": float(cosines[i]), "image": _picture(canary.images[i].numpy())} for i in order]


def _picture(pixels: NDArray[np.uint8]) -> str:
    """(c, s, s) -> a data URI of a PNG."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((WIDE, WIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
