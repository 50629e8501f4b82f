"""Exceptions of the service below HTTP. Each has a code, a message and the field to blame, but no HTTP status.

The table in service.http.errors gives each class its status.
"""


class ServiceError(Exception):
    """A failure that is reported to the caller.

    Parameters
    ----------
    code: a stable name for programs, such as "model_not_found".
    message: for people: what failed, the limit, the remedy.
    field: the part of the request to blame, such as "images[3]".
    retry_after: whole seconds after which the same request may succeed.
    """

    def __init__(self, code: str, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after = retry_after


class InvalidError(ServiceError):
    """The request or what it names cannot be used: a bad image, a damaged artifact, a row of another width."""


class NotFoundError(ServiceError):
    """There is no encoder or model of that name."""


class ConflictError(ServiceError):
    """The request conflicts with the state of the service, such as a swap to a collapsed encoder."""


class OverloadedError(ServiceError):
    """Too many images are pending."""


class UnreadyError(ServiceError):
    """The service is starting, draining or has failed."""


class DeadlineError(ServiceError):
    """The request's deadline passed before its work was done."""


class EmbeddingError(ServiceError):
    """The encoder gave a row that is no embedding."""
