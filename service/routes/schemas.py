"""What OpenAPI says of bodies that the hot path reads and writes without pydantic."""

from typing import Any

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    code: str = Field(examples=["too_many_images"])
    message: str = Field(examples=["at most 128 images fit in one request, not 200: split the request"])
    field: str | None = Field(examples=["images"])


class ErrorBody(BaseModel):
    """The one shape of every failure."""

    error: ErrorDetail


class EmbedBody(BaseModel):
    images: list[str] = Field(description="Base64 or data URIs of image files.", examples=[["iVBORw0KGgo..."]])
    normalize: bool = Field(True, description="L2-normalise the embeddings.")
    encoding_format: str = Field("float", pattern="^(float|base64)$", description="base64: little-endian float32.")


class Embeddings(BaseModel):
    model: str = Field(examples=["fashion-directclr"])
    revision: str = Field(examples=["3f2a9c0d1b5e"])
    dimension: int = Field(examples=[256])
    embeddings: list[list[float]] | list[str]


_FLAGS: dict[str, Any] = {
    "normalize": {"type": "boolean", "default": True},
    "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {
    "type": "object",
    "required": ["images"],
    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}, **_FLAGS},
}

EMBED_BODY: dict[str, Any] = {
    "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in _FLAGS.items()]
    + [{"name": "X-Request-Timeout", "in": "header", "schema": {"type": "number", "exclusiveMinimum": 0}}],
    "requestBody": {
        "required": True,
        "content": {
            "image/*": _BINARY,
            "application/octet-stream": _BINARY,
            "multipart/form-data": {"schema": _FILES},
            "application/json": {"schema": EmbedBody.model_json_schema()},
        },
    },
}

OPENAI_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "input"],
                    "properties": {
                        "model": {"type": "string", "description": "The served encoder's name, or name@revision."},
                        "input": {
                            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
                            "description": "Images as data URIs or base64.",
                        },
                        "encoding_format": _FLAGS["encoding_format"],
                        "dimensions": {"type": "integer"},
                        "user": {"type": "string"},
                    },
                },
                "example": {"model": "fashion-directclr", "input": ["data:image/png;base64,iVBORw0KGgo..."]},
            }
        },
    }
}

OBSERVE_BODY: dict[str, Any] = {
    "parameters": [{"name": "model", "in": "query", "schema": {"type": "string"}, "description": "With a .npy body."}],
    "requestBody": {
        "required": True,
        "content": {
            "application/x-npy": _BINARY,
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "rows"],
                    "properties": {
                        "model": {"type": "string"},
                        "rows": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                    },
                },
                "example": {"model": "their-encoder", "rows": [[0.1, -0.2, 0.3], [0.0, 0.4, -0.1]]},
            },
        },
    },
}

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The body cannot be read."},
    401: {"model": ErrorBody, "description": "A key is needed."},
    406: {"model": ErrorBody, "description": "No form of answer suits Accept."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "The Content-Type is not understood."},
    422: {"model": ErrorBody, "description": "A field or an image is not acceptable."},
    429: {"model": ErrorBody, "description": "Too many images pending; see Retry-After."},
    503: {"model": ErrorBody, "description": "Starting or draining; see Retry-After."},
    504: {"model": ErrorBody, "description": "The deadline passed."},
}

EMBED_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Embeddings, "content": {"application/x-npy": _BINARY, "application/octet-stream": _BINARY}},
    **ERRORS,
}
