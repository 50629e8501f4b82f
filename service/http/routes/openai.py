"""OpenAI's routes /v1/embeddings and /v1/models, for existing clients. Images come as data URIs or base64."""

import base64
import contextlib
from typing import Annotated, Any

import orjson
import torch
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from models.embedder import faulty, normalize
from service.encoders.served import Served
from service.engine.queue import Rows
from service.failures import NotFoundError
from service.http import payload
from service.http.access import Embedding
from service.http.context import body_of, service_of
from service.http.errors import Problem
from service.http.routes.embed import deadline_of, embedded, read_by
from service.http.routes.schemas import (
    OPENAI_BODY,
    OPENAI_MODEL_RESPONSES,
    OPENAI_MODELS_RESPONSES,
    OPENAI_RESPONSES,
    OpenAIModel,
    OpenAIModels,
)

router = APIRouter(tags=["embeddings"], route_class=Embedding)


@router.post(
    "/v1/embeddings",
    openapi_extra=OPENAI_BODY,
    responses=OPENAI_RESPONSES,
    response_class=Response,
)
async def embeddings(request: Request) -> Response:
    """Embed `input`, one image or a list, L2-normalised. `model` names the served encoder; errors are OpenAI's.

    `dimensions` shortens the embeddings of an encoder that was trained for it (Matryoshka), else it is refused.
    """
    service = service_of(request)
    deadline = deadline_of(request, service.settings.request_timeout)
    content = await read_by(request, deadline, body_of(request))
    asked = await payload.apart(len(content), payload.json_object, content, payload.FEW_VALUES)
    if not isinstance(name := asked.get("model"), str):
        there = ", ".join(it.name for it in service.in_service())
        raise Problem(422, "invalid_field", f"model must name an encoder in service: {there}", field="model")
    served = service.served(name)
    _length(asked.get("dimensions"), served)
    encoding = "float" if asked.get("encoding_format") is None else asked["encoding_format"]
    if encoding not in ("float", "base64"):
        raise Problem(422, "invalid_field", "encoding_format must be float or base64", field="encoding_format")
    images = asked.get("input")
    sources = payload.texts([images] if isinstance(images, str) else images, service.settings, "input")
    answer = await embedded(request, sources, deadline, name)
    # The encoder may have been replaced in the meantime, so its card is asked again.
    rows = _first(payload.rows_of(answer, normalized=True), _length(asked.get("dimensions"), answer.served))
    values: Any = [base64.b64encode(row).decode() for row in rows] if encoding == "base64" else rows
    body = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)],
        "model": answer.served.name,
        "revision": answer.served.revision,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=payload.identity_headers(answer), media_type=payload.JSON)


def _length(asked: Any, served: Served) -> int:
    """The number of coordinates to answer with. Raises Problem unless they are an embedding by themselves."""
    card = served.artifact.card
    whole = card.dimension
    if asked is None:
        return whole
    if type(asked) is not int or not 1 <= asked <= whole:  # not isinstance: true is no number of dimensions
        message = f"dimensions must be a whole number from 1 to {whole}, the embedding's length, or left out"
    elif asked < whole and not card.nested_dimensions:
        message = (
            f"dimensions: {served.name} was not trained for nested (Matryoshka) dimensions, so the first {asked} of "
            f"its {whole} coordinates are no embedding; leave dimensions out or send {whole}, or serve an encoder that "
            "was imported with --nested-dimensions"
        )
    else:
        return asked
    raise Problem(400, "invalid_field", message, field="dimensions")


def _first(rows: Rows, length: int) -> Rows:
    """The first `length` coordinates of unit rows, scaled to unit length again. Raises Problem if all are zero."""
    if length == rows.shape[1]:
        return rows
    short = torch.from_numpy(rows[:, :length].copy())
    if bad := faulty(short).nonzero().flatten().tolist():
        message = f"the first {length} coordinates of this image's embedding are all zero; ask for more dimensions"
        raise Problem(500, "nonfinite_embedding", message, field=f"input[{bad[0]}]")
    unit: Rows = normalize(short).numpy()
    return unit


@router.get("/v1/models", responses=OPENAI_MODELS_RESPONSES)
async def models(request: Request) -> OpenAIModels:
    """The encoders in service, the default first, and the other names that a request's `model` may have."""
    service = service_of(request)
    names = dict.fromkeys([*(it.name for it in service.in_service()), "default", *service.settings.aliases])
    data = []
    for name in names:
        with contextlib.suppress(NotFoundError):  # the alias's encoder is not in service now
            data.append(_model(name, service.served(name)))
    return OpenAIModels(object="list", data=data)


Name = Annotated[str, Path(description="A name that `GET /v1/models` lists, or NAME@REVISION.")]


@router.get("/v1/models/{name}", responses=OPENAI_MODEL_RESPONSES)
async def model(request: Request, name: Name) -> OpenAIModel:
    """An encoder in service by one of its names."""
    return _model(name, service_of(request).served(name))


def _model(name: str, served: Served) -> OpenAIModel:
    return OpenAIModel(
        id=name, object="model", created=0, owned_by="fullrank", root=served.name, revision=served.revision
    )
