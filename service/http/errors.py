"""Turns failures into HTTP answers. All have one JSON shape, except on routes that speak another protocol."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from service import failures
from service.failures import ServiceError

CLIENT_CLOSED_REQUEST = 499
LONGEST_MESSAGE = 1000  # characters, beyond which the middle is left out; a message may quote what a client sent
LONGEST_FIELD = 200
STATUS: dict[type[ServiceError], int] = {
    failures.NotFoundError: 404,
    failures.ConflictError: 409,
    failures.InvalidError: 422,
    failures.OverloadedError: 429,
    failures.EmbeddingError: 500,
    failures.UnreadyError: 503,
    failures.DeadlineError: 504,
}


class Problem(HTTPException):
    """An expected failure: HTTP status, code for programs, message for people (what, limit, remedy), field to blame."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.code = code
        self.message = message
        self.field = field


def retry(seconds: int) -> dict[str, str]:
    """Headers that tell a client when to try again."""
    return {"Retry-After": str(seconds)}


def problem_of(error: ServiceError) -> Problem:
    """The Problem for a failure that was raised below HTTP."""
    headers = None if error.retry_after is None else retry(error.retry_after)
    return Problem(STATUS[type(error)], error.code, error.message, field=error.field, headers=headers)


def client_closed() -> Problem:
    """The answer after the client has left. Nobody reads it, but its status shows in fullrank_requests_total."""
    return Problem(CLIENT_CLOSED_REQUEST, "client_closed_request", "the client left before its answer")


def internal_error() -> Problem:
    """The answer to an unexpected exception. It only says that the error is the server's; the log has the details."""
    return Problem(500, "internal", "an unexpected error on the server; its log has the details")


def _cut(text: str, longest: int) -> str:
    """The text without its middle if it is longer. A message begins with what is wrong and ends with the remedy."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _ours(problem: Problem) -> dict[str, Any]:
    return {"error": {"code": problem.code, "message": problem.message, "field": problem.field}}


def _openai(problem: Problem) -> dict[str, Any]:
    """The shape that OpenAI's clients parse: https://platform.openai.com/docs/guides/error-codes."""
    kind = "server_error" if problem.status_code >= 500 else "invalid_request_error"
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


def _inference_protocol(problem: Problem) -> dict[str, Any]:
    """The shape of the Open Inference Protocol, {"error": string}. It has no field, so the text names it.

    https://github.com/open-inference/open-inference-protocol
    """
    blamed = problem.field is not None and problem.field not in problem.message
    return {"error": f"{problem.field}: {problem.message}" if blamed else problem.message}


def respond(path: str, failure: Problem | ServiceError) -> Response:
    """The answer to a failed request for `path`."""
    problem = problem_of(failure) if isinstance(failure, ServiceError) else failure
    problem.message = _cut(problem.message, LONGEST_MESSAGE)
    problem.field = None if problem.field is None else _cut(problem.field, LONGEST_FIELD)
    protocol = path.removeprefix("/").partition("/")[0]
    shape = {"v1": _openai, "v2": _inference_protocol}.get(protocol, _ours)
    return Response(orjson.dumps(shape(problem)), problem.status_code, problem.headers, "application/json")


def _http_exception(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, Problem):
        phrase = HTTPStatus(error.status_code).phrase
        message = f"{request.method} {request.url.path}: {error.detail or phrase}; GET /docs lists the routes"
        error = Problem(error.status_code, phrase.lower().replace(" ", "_"), message, headers=error.headers)
    return respond(request.url.path, error)


def _service_error(request: Request, error: ServiceError) -> Response:
    return respond(request.url.path, error)


def _validation_error(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        problem = Problem(400, "malformed_json", f"the body is not JSON: {reason}", field="body")
        return respond(request.url.path, problem)
    if first["loc"] == ("body",):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return respond(request.url.path, Problem(422, "invalid_field", message, field="body"))
    # The first entry of FastAPI's location is the query, the path or the body.
    parts = first["loc"][1:] if first["loc"][0] in ("body", "query", "path", "header") else first["loc"]
    where = ".".join(map(str, parts))
    return respond(request.url.path, Problem(422, "invalid_field", f"{where}: {first['msg']}", field=where))


def install(app: FastAPI) -> None:
    """Answer every exception that FastAPI raises in the shape of its route. middleware.Edge answers unexpected ones."""
    app.add_exception_handler(HTTPException, _http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(ServiceError, _service_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _validation_error)  # type: ignore[arg-type]
