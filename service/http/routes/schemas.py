"""OpenAPI schemas, with working examples, of the routes that embed: they read and write without pydantic."""

from typing import Any, Literal

from pydantic import BaseModel, Field

Responses = dict[int | str, dict[str, Any]]
IMAGE = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNkEIAAJgGKGACOGAQAwSeVywAAAABJRU5ErkJggg=="
DATA_URI = f"data:image/png;base64,{IMAGE}"
ENCODER = {"model": "fashion-byol", "revision": "26bac791d1d4"}
RUNS = {"engine": "onnx", "dtype": "float32"}


class ErrorDetail(BaseModel):
    code: str = Field(examples=["too_many_images"])
    message: str = Field(examples=["at most 128 images fit in one request, not 200: split the request"])
    field: str | None = Field(examples=["images"])


class ErrorBody(BaseModel):
    """The shape of every failure, except on /v1 and /v2."""

    error: ErrorDetail


class OpenAIErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The shape of a failure that OpenAI's clients parse."""

    error: OpenAIErrorDetail


class ProtocolError(BaseModel):
    """The Open Inference Protocol's shape of a failure."""

    error: str = Field(examples=["no encoder 'resnet' is in service; fashion-byol@26bac791d1d4 is"])


class EmbedBody(BaseModel):
    images: list[str] = Field(description="Base64 or data URIs of image files.", min_length=1)
    normalize: bool = Field(True, description="L2-normalise the embeddings.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32.")
    model: str | None = Field(None, description="An encoder in service, NAME or NAME@REVISION; else the default.")


class Embeddings(BaseModel):
    model: str
    revision: str
    dimension: int
    embeddings: list[list[float]] | list[str]


class OpenAIBody(BaseModel):
    model: str = Field(description="The served encoder's name, or name@revision.")
    input: str | list[str] = Field(description="Images as data URIs or base64.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        None,
        ge=1,
        description="The first so many coordinates, if the encoder was trained for that.",
    )
    user: str | None = Field(None, description="Ignored.")


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIUsage(BaseModel):
    """Images have no tokens."""

    prompt_tokens: Literal[0]
    total_tokens: Literal[0]


class OpenAIEmbeddings(BaseModel):
    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    revision: str = Field(description="The encoder's revision. Rows of two revisions cannot be compared.")
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    id: str = Field(description="What a request's model may say.")
    object: Literal["model"]
    created: int = Field(description="0: not known.")
    owned_by: str
    root: str = Field(description="The encoder's own name.")
    revision: str


class OpenAIModels(BaseModel):
    object: Literal["list"]
    data: list[OpenAIModel]


class OutputTensor(BaseModel):
    name: Literal["embeddings"]
    datatype: Literal["FP32"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = None


class InferAnswer(BaseModel):
    """The JSON part of an answer."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


FAILURES = {
    400: "The body cannot be read.",
    401: "A key is needed.",
    403: "This key lacks the scope. Without a key: only loopback may call, and no page of another site.",
    404: "Not found; the message says what there is.",
    406: "Accept allows no form of answer that this route has.",
    408: "The body came too slowly, or the request's own deadline passed.",
    409: "The request conflicts with the present state.",
    413: "The body is too large.",
    415: "The Content-Type is not understood.",
    422: "A field or an image is not acceptable.",
    429: "Too many images or bytes pending; see Retry-After.",
    500: "Not the client's fault.",
    503: "Starting or draining; see Retry-After.",
    504: "The deadline passed.",
}
EMBEDDING = (400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)


def failures(*codes: int, shape: type[BaseModel] = ErrorBody) -> Responses:
    """OpenAPI responses for these failure statuses, in one shape."""
    return {code: {"model": shape, "description": FAILURES[code]} for code in codes}


def example(value: Any, media: str = "application/json") -> Responses:
    """An OpenAPI response 200 with this example."""
    return {200: {"content": {media: {"example": value}}}}


def loose(value: dict[str, Any]) -> Responses:
    """An OpenAPI response 200 whose JSON object has at least the fields of this example."""
    schema = {"type": "object", "required": list(value)}
    return {200: {"content": {"application/json": {"schema": schema, "example": value}}}}


REFERENCE = "#/components/schemas/{model}"
BODIES: list[type[BaseModel]] = []  # openapi.py adds them to the document


def body(model: type[BaseModel], value: Any) -> dict[str, Any]:
    """An OpenAPI request body in JSON, with an example that works."""
    BODIES.append(model)
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}, "example": value}}


KEY: dict[str, Any] = {"security": [{"key": []}, {}]}  # {}: no key is needed if none is set
_FLAGS: dict[str, Any] = {
    "normalize": {"type": "boolean", "default": True, "description": "false: the rows as the encoder made them."},
    "encoding_format": {
        "type": "string",
        "enum": ["float", "base64"],
        "default": "float",
        "description": "Of JSON. base64: little-endian float32.",
    },
    "model": {"type": "string", "description": "An encoder in service, NAME or NAME@REVISION; else the default."},
}
_TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "Seconds after which the work is dropped.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {
    "type": "object",
    "required": ["images"],
    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}}
    | _FLAGS,
    "additionalProperties": False,
}

EMBED_BODY: dict[str, Any] = KEY | {
    "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in _FLAGS.items()] + [_TIMEOUT],
    "requestBody": {
        "required": True,
        "content": {
            **body(EmbedBody, {"images": [IMAGE, DATA_URI]}),
            "image/*": BINARY,
            "application/octet-stream": BINARY,
            "multipart/form-data": {"schema": _FILES},
        },
    },
}
_EMBEDDINGS = ENCODER | {"dimension": 3, "embeddings": [[0.6, 0.0, 0.8], [0.6, 0.0, 0.8]]}
EMBED_RESPONSES: Responses = {
    200: {
        "model": Embeddings,
        "description": "One row for each image, in order.",
        "content": {
            "application/json": {"example": _EMBEDDINGS},
            "application/x-npy": BINARY,
            "application/octet-stream": BINARY,
        },
    },
    **failures(404, 406, *EMBEDDING),
}

OPENAI_BODY: dict[str, Any] = KEY | {
    "parameters": [_TIMEOUT],
    "requestBody": {
        "required": True,
        "content": body(OpenAIBody, {"model": ENCODER["model"], "input": [DATA_URI]}),
    },
}
_OPENAI = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.0, 0.8]}],
    **ENCODER,
    "usage": {"prompt_tokens": 0, "total_tokens": 0},
}
OPENAI_RESPONSES: Responses = {
    200: {"model": OpenAIEmbeddings, "content": {"application/json": {"example": _OPENAI}}},
    **failures(404, *EMBEDDING, shape=OpenAIError),
}
_MODEL = {"id": ENCODER["model"], "object": "model", "created": 0, "owned_by": "fullrank"}
_MODEL |= {"root": ENCODER["model"], "revision": ENCODER["revision"]}
OPENAI_MODEL_RESPONSES: Responses = example(_MODEL) | failures(401, 403, 404, 503, shape=OpenAIError)
OPENAI_MODELS_RESPONSES: Responses = example({"object": "list", "data": [_MODEL]}) | failures(
    401, 403, 503, shape=OpenAIError
)


def in_path(*names: str) -> dict[str, Any]:
    """OpenAPI path parameters: the name of an encoder in service, and its revision."""
    described = {"name": "An encoder in service.", "version": "Its revision."}
    return {
        "parameters": [
            {"name": name, "in": "path", "required": True, "description": described[name], "schema": {"type": "string"}}
            for name in names
        ]
    }


def infer_body(model: type[BaseModel], *names: str) -> dict[str, Any]:
    """An OpenAPI request body: JSON alone, or JSON and a binary tail."""
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [IMAGE]}
    tail = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Bytes of JSON before a binary tail.",
        "schema": {"type": "integer", "minimum": 0},
    }
    content = body(model, {"id": "7", "inputs": [tensor]}) | {"application/octet-stream": BINARY}
    return KEY | {
        "parameters": [*in_path(*names)["parameters"], _TIMEOUT, tail],
        "requestBody": {"required": True, "content": content},
    }


_INFERRED = {
    "model_name": ENCODER["model"],
    "model_version": ENCODER["revision"],
    "outputs": [{"name": "embeddings", "datatype": "FP32", "shape": [1, 3], "data": [0.6, 0.0, 0.8]}],
    "id": "7",
}
INFER_RESPONSES: Responses = {
    200: {
        "model": InferAnswer,
        "content": {"application/json": {"example": _INFERRED}, "application/octet-stream": BINARY},
    },
    **failures(404, *EMBEDDING, shape=ProtocolError),
}
UNREADY = failures(503, shape=ProtocolError)
UNKNOWN = failures(404, 503, shape=ProtocolError)
