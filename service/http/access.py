"""Who may call: a bearer key where one is set; without one, loopback for routes that administer or reveal state."""

import ipaddress
import secrets
from urllib.parse import urlsplit

from fastapi import Depends, Request

from service.http.context import service_of
from service.http.errors import Problem


async def require_key(request: Request) -> None:
    """Let a request pass that bears the key, or any when no key is set. Raises Problem 401."""
    key = service_of(request).settings.api_key
    if key is not None and not _bears(request, key.get_secret_value()):
        raise Problem(
            401,
            "unauthorized",
            "this route needs the service's key; send Authorization: Bearer KEY",
            field="Authorization",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def require_trust(request: Request) -> None:
    """With a key set, as require_key; without one, loopback clients only. Raises Problem 401 or 403."""
    if service_of(request).settings.api_key is not None:
        await require_key(request)
    # Host and Origin are asked too: a page in a local browser comes from loopback, but names itself in one of them.
    elif not (
        request.client
        and _is_loopback(request.client.host)
        and _is_loopback(request.url.hostname or "")
        and _is_loopback(_host_of(request.headers.get("origin", "http://localhost")))
    ):
        raise Problem(
            403,
            "forbidden",
            "without FULLRANK_API_KEY this route answers on loopback only; set a key and send it as a bearer token",
        )


def _bears(request: Request, key: str) -> bool:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(token.strip().encode(), key.encode())


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Key, Trust = Depends(require_key), Depends(require_trust)
