"""The routes of the Open Inference Protocol (v2), with its binary data extension, for clients of KServe and Triton.

The protocol is https://github.com/open-inference/open-inference-protocol, and the binary tail
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md. A version is an
encoder's revision. An encoder has two inputs, and a request sends one of them: `images` (BYTES, shape [n]: image files,
in base64 in JSON and raw in a binary tail) or `pixels` (UINT8, shape [n, 1 or 3, height, width], of any size).
"""

import math
import re
import struct
from typing import Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from fullrank import __version__ as VERSION
from service.encoders.served import Answer, Source
from service.engine.queue import Pixels
from service.http import payload
from service.http.access import Embedding
from service.http.context import context_of, service_of
from service.http.errors import Problem, retry
from service.http.routes import schemas
from service.http.routes.embed import deadline_of, embedded, read_by
from service.settings import Settings

router = APIRouter(prefix="/v2", tags=["open inference protocol"])
guarded = APIRouter(route_class=Embedding)
LENGTH = "Inference-Header-Content-Length"
INPUTS = {"images": "BYTES", "pixels": "UINT8"}
NAMED, VERSIONED = ("name",), ("name", "version")


class InputParameters(BaseModel):
    binary_data_size: int | None = Field(
        default=None, ge=0, description="Bytes of this tensor in the tail after the JSON."
    )


class Input(BaseModel):
    name: Literal["images", "pixels"]
    shape: list[PositiveInt] = Field(max_length=4)
    datatype: Literal["BYTES", "UINT8"]
    parameters: InputParameters = Field(default_factory=InputParameters)
    data: list[Any] | None = Field(None, description="The elements in row-major order, nested or flat.")


class OutputParameters(BaseModel):
    binary_data: bool | None = None


class Output(BaseModel):
    name: Literal["embeddings"]
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class Parameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    normalize: bool = Field(default=True, description="L2-normalise the embeddings.")
    binary_data_output: bool = Field(default=False, description="Answer in a binary tail where an output does not say.")
    timeout: int = Field(
        default=0, ge=0, description="Microseconds after which the work is dropped; 0: the service's limit."
    )


class Inference(BaseModel):
    """The JSON part of a request to infer."""

    id: str | None = None
    parameters: Parameters = Field(default_factory=Parameters)
    inputs: list[Input] = Field(min_length=1, max_length=1)
    outputs: list[Output] | None = Field(None, max_length=1)


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The inputs and outputs of a model. A request sends one of the inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


SERVER = {"name": "fullrank", "version": VERSION, "extensions": ["binary_tensor_data"]}
METADATA = {
    "name": "fashion-byol",
    "versions": ["26bac791d1d4"],
    "platform": "pytorch_safetensors",
    "inputs": [
        {"name": "images", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, 1, -1, -1]},
    ],
    "outputs": [{"name": "embeddings", "datatype": "FP32", "shape": [-1, 256]}],
}


@router.get("", responses=schemas.example(SERVER))
async def server_metadata() -> ServerMetadata:
    """The server's name, version and supported extensions."""
    return ServerMetadata.model_validate(SERVER)


@router.get("/health/live", responses=schemas.example({"live": True}))
async def live() -> dict[str, bool]:
    """Alive: the event loop answers."""
    return {"live": True}


@router.get("/health/ready", responses=schemas.example({"ready": True}) | schemas.UNREADY)
async def ready(request: Request) -> dict[str, bool]:
    """Ready to infer; 503 with the reason otherwise."""
    service = service_of(request)
    if service.phase != "ready":
        raise Problem(503, service.phase, service.failure or f"the service is {service.phase}", headers=retry(1))
    return {"ready": True}


@router.get(
    "/models/{name}",
    responses=schemas.example(METADATA) | schemas.UNKNOWN,
    openapi_extra=schemas.in_path(*NAMED),
)
@router.get(
    "/models/{name}/versions/{version}",
    responses=schemas.example(METADATA) | schemas.UNKNOWN,
    openapi_extra=schemas.in_path(*VERSIONED),
)
async def model_metadata(request: Request) -> ModelMetadata:
    """The tensors of an encoder in service."""
    card = service_of(request).served(model_of(request)).artifact.card
    return ModelMetadata(
        name=card.name,
        versions=[card.revision],
        platform="pytorch_safetensors",
        inputs=[
            TensorMetadata(name="images", datatype="BYTES", shape=[-1]),
            TensorMetadata(name="pixels", datatype="UINT8", shape=[-1, card.preprocessing.channels, -1, -1]),
        ],
        outputs=[TensorMetadata(name="embeddings", datatype="FP32", shape=[-1, card.dimension])],
    )


READY = {"name": "fashion-byol", "ready": True}


@router.get(
    "/models/{name}/ready",
    responses=schemas.example(READY) | schemas.UNKNOWN,
    openapi_extra=schemas.in_path(*NAMED),
)
@router.get(
    "/models/{name}/versions/{version}/ready",
    responses=schemas.example(READY) | schemas.UNKNOWN,
    openapi_extra=schemas.in_path(*VERSIONED),
)
async def model_ready(request: Request) -> dict[str, Any]:
    """Whether this encoder can infer."""
    await ready(request)
    return {"name": service_of(request).served(model_of(request)).name, "ready": True}


INFER: dict[str, Any] = {
    "responses": schemas.INFER_RESPONSES,
    "response_class": Response,
}


@guarded.post("/models/{name}/infer", openapi_extra=schemas.infer_body(Inference, *NAMED), **INFER)
@guarded.post(
    "/models/{name}/versions/{version}/infer", openapi_extra=schemas.infer_body(Inference, *VERSIONED), **INFER
)
async def infer(request: Request) -> Response:
    """Embed `images` (BYTES) or `pixels` (UINT8); `embeddings` (FP32, [n, d]) come back as JSON or in a binary tail.

    With a tail, the header Inference-Header-Content-Length is the length of the JSON before it, in both directions.
    """
    service = service_of(request)
    deadline = deadline_of(request, service.settings.request_timeout)
    service.served(model := model_of(request))  # an unknown model is refused before the body is read
    body = await read_by(request, deadline, request.body())
    asked, images = await payload.apart(len(body), understood, body, request.headers.get(LENGTH), service.settings)
    context = context_of(request.scope)
    if 0 < asked.parameters.timeout < 1e6 * (deadline - context.started):  # it may be too long for a float
        deadline = context.started + asked.parameters.timeout / 1e6
        context.client_deadline = True
    answer = await embedded(request, images, deadline, model)
    return answered(answer, asked)


def model_of(request: Request) -> str:
    """The model that the path names, in the form that Service.served takes."""
    return "@".join(request.path_params[part] for part in VERSIONED if part in request.path_params)


def understood(body: bytes, length: str | None, settings: Settings) -> tuple[Inference, list[Source]]:
    """Parse a request and its images. Raises Problem 4xx or RequestValidationError (422)."""
    asked, tail = split(body, length)
    return asked, sources(asked.inputs[0], tail, settings)


def split(body: bytes, length: str | None) -> tuple[Inference, bytes]:
    """Split a body into the JSON request and the binary tail. Raises Problem 400 or RequestValidationError (422)."""
    if length is not None and not (re.fullmatch("[0-9]{1,12}", length) and int(length) <= len(body)):
        message = f"{LENGTH} must be the length of the JSON, at most the body's {len(body)} bytes, not {length!r}"
        raise Problem(400, "invalid_field", message, field=LENGTH)
    end = len(body) if length is None else int(length)
    try:
        return Inference.model_validate(payload.json_object(body[:end])), body[end:]
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def sources(tensor: Input, tail: bytes, settings: Settings) -> list[Source]:
    """The images of a tensor. Raises Problem 4xx if shape, type, data and tail disagree."""
    shape = tensor.shape
    field = f"inputs.{tensor.name}"
    if tensor.datatype != INPUTS[tensor.name]:
        raise _wrong(f"datatype must be {INPUTS[tensor.name]}, not {tensor.datatype}", field)
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise _wrong("send either data or parameters.binary_data_size and a binary tail", field)
    if (size or 0) != len(tail):
        raise _wrong(f"binary_data_size says {size or 0} bytes, but {len(tail)} follow the JSON", field)
    payload.check_count(shape[0] if shape else 0, settings, field)
    if tensor.name == "pixels":
        # A side may be text of thousands of digits: Python would refuse to write their product out.
        if len(shape) != 4 or shape[1] not in (1, 3) or max(shape) >= 2**63:
            raise _wrong(f"shape must be [n, 1 or 3, height, width], not {shape}", field)
        pixels = np.frombuffer(tail, np.uint8) if tensor.data is None else _numbers(tensor.data, field)
        if pixels.size != (wanted := math.prod(shape)):
            raise _wrong(f"shape {shape} means {wanted} elements, not {pixels.size}", field)
        return [Source(image, f"{field}[{i}]") for i, image in enumerate(pixels.reshape(shape))]
    if shape[1:] not in ([], [1]):
        raise _wrong(f"shape must be [n], not {shape}", field)
    data: list[Any] = _elements(tail, field) if tensor.data is None else tensor.data
    if all(isinstance(row, list) for row in data):
        data = [element for row in data for element in row]
    if len(data) != shape[0]:
        raise _wrong(f"shape {shape} means {shape[0]} elements, not {len(data)}", field)
    if tensor.data is not None:
        return payload.texts(data, settings, field)
    return [Source(image, f"{field}[{i}]") for i, image in enumerate(data)]


def _numbers(data: list[Any], field: str) -> Pixels:
    try:
        numbers = np.array(data)
    except ValueError as error:
        raise _wrong(f"data must be nested evenly, or flat: {error}", field) from error
    if numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() > 255:
        raise _wrong("data must be whole numbers from 0 to 255", field)
    return numbers.astype(np.uint8)


def _elements(tail: bytes, field: str) -> list[bytes]:
    """Split a BYTES tensor into its elements. Before each stands its length, 4 bytes, little-endian."""
    elements = []
    start = 0
    while start < len(tail):
        if start + 4 > len(tail):
            raise _wrong("the binary tail ends within an element's length", field)
        (length,) = struct.unpack_from("<I", tail, start)
        start += 4 + length
        if start > len(tail):
            raise _wrong("the binary tail ends within an element", field)
        elements.append(tail[start - length : start])
    return elements


def _wrong(message: str, field: str) -> Problem:
    return Problem(422, "invalid_field", f"{field}: {message}", field=field)


def answered(answer: Answer, asked: Inference) -> Response:
    """The answer with the embeddings, as JSON or with a binary tail, as the request asks."""
    rows = payload.rows_of(answer, normalized=asked.parameters.normalize)
    wish = asked.outputs[0].parameters.binary_data if asked.outputs else None
    binary = asked.parameters.binary_data_output if wish is None else wish
    output: dict[str, Any] = {"name": "embeddings", "datatype": "FP32", "shape": list(rows.shape)}
    output |= {"parameters": {"binary_data_size": rows.nbytes}} if binary else {"data": rows.ravel()}
    head = {"model_name": answer.served.name, "model_version": answer.served.revision, "outputs": [output]}
    content = orjson.dumps(head | ({} if asked.id is None else {"id": asked.id}), option=orjson.OPT_SERIALIZE_NUMPY)
    headers = payload.identity_headers(answer)
    if not binary:
        return Response(content, headers=headers, media_type=payload.JSON)
    headers[LENGTH] = str(len(content))
    return Response(content + rows.tobytes(), headers=headers, media_type=payload.RAW)


router.include_router(guarded)
