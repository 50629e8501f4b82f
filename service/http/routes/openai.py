"""POST /v1/embeddings: the OpenAI shape, so that existing clients work; images come as data URIs or base64."""

import base64
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.http import payload
from service.http.access import Key
from service.http.context import service_of
from service.http.errors import Problem
from service.http.routes.embed import deadline_of, embedded, read_by
from service.http.routes.schemas import OPENAI_BODY, OPENAI_RESPONSES

router = APIRouter(tags=["embeddings"])


@router.post(
    "/v1/embeddings",
    dependencies=[Key],
    openapi_extra=OPENAI_BODY,
    responses=OPENAI_RESPONSES,
    response_class=Response,
)
async def embeddings(request: Request) -> Response:
    """Embed `input`, one image or a list, L2-normalised. `model` names the served encoder; errors are OpenAI's."""
    service = service_of(request)
    deadline = deadline_of(request, service.settings.request_timeout)
    body = payload.json_object(await read_by(request, deadline, request.body()))
    if not isinstance(model := body.get("model"), str):
        there = ", ".join(it.name for it in service.in_service())
        raise Problem(422, "invalid_field", f"model must name an encoder in service: {there}", field="model")
    served = service.served(model)
    if body.get("dimensions") not in (None, served.artifact.card.dimension):
        message = f"embeddings have {served.artifact.card.dimension} dimensions; leave dimensions out"
        raise Problem(422, "invalid_field", message, field="dimensions")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Problem(422, "invalid_field", "encoding_format must be float or base64", field="encoding_format")
    images = body.get("input")
    sources = payload.texts([images] if isinstance(images, str) else images, service.settings, "input")
    answer = await embedded(request, sources, deadline, model)
    rows = payload.rows_of(answer, normalized=True)
    values: Any = [base64.b64encode(row).decode() for row in rows] if encoding == "base64" else rows
    content = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)],
        "model": answer.served.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    headers = {"Server-Timing": payload.timing(answer)}
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), headers=headers, media_type=payload.JSON)
