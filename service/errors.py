"""One error shape for every failure: {"error": {"code", "message", "field"}}."""

import logging
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

log = logging.getLogger("fullrank.service")

CLIENT_CLOSED_REQUEST = 499


class Problem(HTTPException):
    """A failure on purpose: status and code for machines, message (what, limit, remedy) for people, field to blame."""

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
        self.code, self.message, self.field = code, message, field

    def response(self) -> Response:
        return error_response(self.status_code, self.code, self.message, self.field, self.headers)


def error_response(
    status: int, code: str, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    body = orjson.dumps({"error": {"code": code, "message": message, "field": field}})
    return Response(body, status, headers, "application/json")


def internal_error() -> Response:
    """What a client learns of an unexpected exception: nothing but that it is ours; the log has the rest."""
    return error_response(500, "internal", "an unexpected error on the server; its log has the details")


def _http_exception(request: Request, error: HTTPException) -> Response:
    if isinstance(error, Problem):
        return error.response()
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{request.method} {request.url.path}: {error.detail or phrase}; GET /docs lists the routes"
    return error_response(error.status_code, phrase.lower().replace(" ", "_"), message, headers=error.headers)


def _validation_error(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return error_response(422, "invalid_field", f"{where}: {first['msg']}", where)


def install(app: FastAPI) -> None:
    """Answer every exception the framework raises in the one shape; middleware.Edge does so for the unexpected ones."""
    app.add_exception_handler(HTTPException, _http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _validation_error)  # type: ignore[arg-type]
