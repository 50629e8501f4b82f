"""Parses requests to POST /embed in each content type, and encodes the answers."""

import asyncio
import base64
import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.encoders.served import Answer, Source
from service.engine.queue import Rows
from service.http.context import body_of, header_of
from service.http.errors import Problem
from service.settings import Settings

T = TypeVar("T")
Form = Literal["json", "npy", "raw"]
JSON = "application/json"
NPY = "application/x-npy"
RAW = "application/octet-stream"
FORMS: dict[str, Form] = {JSON: "json", "application/*": "json", "*/*": "json", NPY: "npy", RAW: "raw"}
OPTIONS = ("normalize", "encoding_format", "model")
# Parsing holds the GIL on any thread, and so delays every other request: a million numbers take 0.1 s, as many lists or
# fields four times as long.
MAX_VALUES = 1_000_000
MAX_NESTED = 100_000
MAX_FIELDS = 10_000
FEW_VALUES = 10_000  # limit for a body whose values are images
LARGE = 256 * 2**10  # bytes above which parsing runs on a worker thread, so that the event loop can run meanwhile


@dataclass(frozen=True)
class Payload:
    """A parsed request: encoded images, and the form in which their embeddings go back."""

    sources: list[Source]
    normalize: bool = True
    base64: bool = False
    model: str | None = None


async def read(request: Request, settings: Settings) -> Payload:
    """Read a request's body as its Content-Type says. Raises Problem 4xx naming field, limit and remedy."""
    named = header_of(request, b"content-type")
    media = RAW if named is None else named.partition(";")[0].strip().lower()
    fields: dict[str, Any] = dict(request.query_params) if request.scope["query_string"] else {}
    if media == JSON:
        body = await body_of(request)
        fields |= await apart(len(body), json_object, body, FEW_VALUES)
        sources = texts(fields.pop("images", None), settings, "images")
    elif media == "multipart/form-data":
        sources, options = await _multipart(request, settings)
        fields |= options
    elif media == RAW or media.startswith("image/"):
        sources = [Source(await body_of(request), "body")]
        if not sources[0].data:
            raise Problem(400, "empty_body", "the body is empty; send the bytes of an image file", field="body")
    else:
        raise Problem(
            415,
            "unsupported_media_type",
            f"Content-Type {media!r} is not understood; send image/* or application/octet-stream (one image), "
            "multipart/form-data (files named images) or application/json",
            field="Content-Type",
        )
    return Payload(sources, **_options(fields)) if fields else Payload(sources)


async def apart(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call function(*arguments), on a worker thread if it works on more than LARGE bytes (`size`)."""
    return function(*arguments) if size <= LARGE else await asyncio.to_thread(function, *arguments)


def json_object(body: bytes, values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse a JSON object that holds at most `values` values. Raises Problem 400, 413 or 422."""
    for limit, what, marks in (
        (values, "values", (b",",)),
        (MAX_NESTED, "lists and objects", (b"[", b"{")),
        (MAX_FIELDS, "fields", (b":",)),
    ):
        if sum(map(body.count, marks)) > limit:
            message = f"JSON of more than {limit} {what} is not read; send fewer at a time, or numbers in binary form"
            raise Problem(413, "body_too_large", message, field="body")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "malformed_json", f"the body is not JSON: {error}", field="body") from error
    if not isinstance(value, dict):
        raise Problem(422, "invalid_field", "the body must be a JSON object", field="body")
    return value


def texts(images: Any, settings: Settings, field: str) -> list[Source]:
    """Images from a JSON list of base64 strings or data URIs, the request's `field`. Raises Problem 422."""
    if not isinstance(images, list):
        raise Problem(422, "invalid_field", f"{field} must be a list of base64 strings or data URIs", field=field)
    check_count(len(images), settings, field)
    for index, image in enumerate(images):
        if not isinstance(image, str):
            message = f"{field}[{index}] must be a base64 string or data URI, not {type(image).__name__}"
            raise Problem(422, "invalid_field", message, field=f"{field}[{index}]")
    return [Source(image, f"{field}[{index}]") for index, image in enumerate(images)]


class _Parser(MultiPartParser):
    """Starlette's parser, which also records whether the body was complete: a cut one would silently lose images."""

    complete = False

    def on_end(self) -> None:
        self.complete = True


async def _multipart(request: Request, settings: Settings) -> tuple[list[Source], dict[str, str]]:
    limit = settings.max_images_per_request
    parser = _Parser(request.headers, request.stream(), max_files=limit, max_fields=len(OPTIONS))
    # Keep files in memory: bodies are bounded already, and a temporary file for each large image would cost time.
    parser.spool_max_size = settings.max_body_bytes
    try:
        form = await parser.parse()
        if not parser.complete:
            raise MultiPartException("it ends before its last boundary")
    except (UnicodeError, LookupError) as error:  # charset= may name any codec of Python, or none
        message = "the charset of the multipart body is not understood; leave it out"
        raise Problem(400, "malformed_multipart", message, field="Content-Type") from error
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many(limit) from error
        raise Problem(
            400, "malformed_multipart", f"the multipart body is damaged: {error.message}", field="body"
        ) from error
    sources: list[Source] = []
    options: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "images":
                raise Problem(422, "unknown_field", f"unknown file field {name!r}; name every file images", field=name)
            sources.append(Source(await value.read(), f"images[{len(sources)}]"))
        elif name == "images":
            raise Problem(422, "invalid_field", "images must be file parts, with a filename", field="images")
        else:
            options[name] = value
    await form.close()
    check_count(len(sources), settings)
    return sources, options


def check_count(images: int, settings: Settings, field: str = "images") -> None:
    """Raise Problem 422 for no images, or for more than one request may hold."""
    if not images:
        raise Problem(422, "no_images", "there are no images; send at least one", field=field)
    if images > settings.max_images_per_request:
        raise too_many(settings.max_images_per_request, images, field)


def too_many(limit: int, images: int | None = None, field: str = "images") -> Problem:
    """The answer to a request with more images than the limit."""
    count = f"{images} images" if images else "more images than that"
    message = f"at most {limit} images fit in one request, not {count}: split the request"
    return Problem(422, "too_many_images", message, field=field)


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(fields.keys() - set(OPTIONS)):
        raise Problem(
            422,
            "unknown_field",
            f"unknown field {unknown[0]!r}; known are images, {', '.join(OPTIONS)}",
            field=unknown[0],
        )
    options: dict[str, Any] = {}
    if "normalize" in fields:
        flag = {"true": True, "false": False, "1": True, "0": False}.get(str(fields["normalize"]).lower())
        if flag is None:
            raise Problem(422, "invalid_field", "normalize must be true or false", field="normalize")
        options["normalize"] = flag
    if "encoding_format" in fields:
        if fields["encoding_format"] not in ("float", "base64"):
            raise Problem(422, "invalid_field", "encoding_format must be float or base64", field="encoding_format")
        options["base64"] = fields["encoding_format"] == "base64"
    if (model := fields.get("model")) is not None:
        if not isinstance(model, str):
            raise Problem(422, "invalid_field", "model must be the name of an encoder in service", field="model")
        options["model"] = model
    return options


@functools.lru_cache(256)
def accepted(accept: str) -> Form:
    """The answer's form that an Accept header asks for. Raises Problem 406 if none of ours suits."""
    best = 0.0
    choice = None
    for part in accept.split(",") if accept else ["*/*"]:
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        try:
            quality = next((float(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        except ValueError:
            quality = 0.0
        if media in FORMS and quality > best:
            best = quality
            choice = FORMS[media]
    if choice is None:
        raise Problem(
            406, "not_acceptable", f"Accept must allow {JSON}, {NPY} or {RAW}, not only {accept!r}", field="Accept"
        )
    return choice


def encode(answer: Answer, payload: Payload, form: Form) -> Response:
    """Encode the answer as JSON, .npy or raw little-endian float32 with its shape in X-Shape."""
    rows = rows_of(answer, normalized=payload.normalize)
    served = answer.served
    headers = [*served.headers, (b"server-timing", timing(answer).encode())]
    if form == "json":
        embeddings: Any = [base64.b64encode(row).decode() for row in rows] if payload.base64 else rows
        body = {"model": served.name, "revision": served.revision, "dimension": rows.shape[1], "embeddings": embeddings}
        return _Encoded(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), JSON, headers)
    headers.append((b"x-shape", b"%d,%d" % rows.shape))
    if form == "raw":
        return _Encoded(rows.tobytes(), RAW, headers)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows)
    return _Encoded(buffer.getvalue(), NPY, headers)


class _Encoded(Response):
    """A Response whose headers are bytes already: Starlette would encode strings anew for each answer."""

    def __init__(self, body: bytes, media_type: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        own = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]
        self.raw_headers = [*headers, *own]


def identity_headers(answer: Answer) -> dict[str, str]:
    """Headers that name the encoder and its revision, and give the time of each phase."""
    served = answer.served
    return {"X-Model": served.name, "X-Revision": served.revision, "Server-Timing": timing(answer)}


def timing(answer: Answer) -> str:
    """A Server-Timing header (https://www.w3.org/TR/server-timing/): milliseconds of each phase."""
    decode = answer.decode_seconds * 1e3
    queue = answer.queue_seconds * 1e3
    forward = answer.forward_seconds * 1e3
    return f"decode;dur={decode:.2f}, queue;dur={queue:.2f}, forward;dur={forward:.2f}"


def rows_of(answer: Answer, *, normalized: bool) -> Rows:
    """The answer's rows as little-endian float32."""
    rows = answer.unit if normalized else answer.rows
    return np.ascontiguousarray(rows, dtype="<f4")
