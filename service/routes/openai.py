"""POST /v1/embeddings: the OpenAI shape, so that existing clients work; images come as data URIs or base64."""

import base64
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from service import payload
from service.access import require_key, service_of
from service.errors import Problem
from service.routes.embed import deadline_of, read_by, until_disconnected
from service.routes.schemas import OPENAI_BODY

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", openapi_extra=OPENAI_BODY, response_class=Response)
async def embeddings(request: Request) -> Response:
    """Embed `input`, one image or a list, L2-normalised. `model` names the served encoder; errors are OpenAI's."""
    try:
        await require_key(request)
        return await _embeddings(request)
    except Problem as problem:
        kind = "server_error" if problem.status_code >= 500 else "invalid_request_error"
        error = {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}
        return Response(orjson.dumps({"error": error}), problem.status_code, problem.headers, payload.JSON)


async def _embeddings(request: Request) -> Response:
    service = service_of(request)
    deadline = deadline_of(request, service.settings.request_timeout)
    body = payload.json_object(await read_by(deadline, request.body()))
    served = service.current
    if body.get("model") not in (served.name, f"{served.name}@{served.revision}"):
        message = f"this service serves {served.name!r}, not {body.get('model')!r}"
        raise Problem(404, "model_not_found", message, field="model")
    if body.get("dimensions") not in (None, served.artifact.card.dimension):
        message = f"embeddings have {served.artifact.card.dimension} dimensions; leave dimensions out"
        raise Problem(422, "invalid_field", message, field="dimensions")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise Problem(422, "invalid_field", "encoding_format must be float or base64", field="encoding_format")
    images = body.get("input")
    sources = payload.texts([images] if isinstance(images, str) else images, service.settings, "input")
    async with until_disconnected(request):
        answer = await service.embed(sources, deadline)
    rows = payload.rows_of(answer, normalized=True)
    values: Any = [base64.b64encode(row).decode() for row in rows] if encoding == "base64" else rows
    content = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)],
        "model": answer.served.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=payload.JSON)
