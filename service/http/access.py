"""Access control: a request needs a key with its route's scope. This is decided before any of the body is read.

Without keys, routes that administer or reveal state answer on loopback only, and pages in a browser may call only if
their origin is allowed.
"""

import ipaddress
import secrets
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import Scope as Asgi

from service.http.context import context_of, header_of
from service.http.errors import Problem
from service.keys import Scope

FORWARDED = ("x-forwarded-for", "x-real-ip", "forwarded")


class Guarded(APIRoute):
    """A FastAPI route that checks the key before it reads the body. FastAPI's own dependencies would read it first."""

    scope: Scope

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            authorize(request, self.scope)
            return await answer(request)

        return guarded


class Embedding(Guarded):
    """A route that embeds."""

    scope = "embed"


class Observing(Guarded):
    """A route that takes embeddings made elsewhere."""

    scope = "observe"


class Revealing(Guarded):
    """A route that reveals the monitors' exact state."""

    scope = "metrics"


class Administering(Guarded):
    """A route that administers."""

    scope = "admin"


def authorize(request: Request, scope: Scope) -> None:
    """Check that a request may use routes of this scope. Raises Problem 401 or 403."""
    context = context_of(request.scope)
    if grants := context.front.grants:
        token = _token(request)
        matching = [it for it in grants if secrets.compare_digest(token, it.key)]
        if not matching:
            raise Problem(
                401,
                "unauthorized",
                "this route needs the service's key; send Authorization: Bearer KEY",
                field="Authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not any(scope in it.scopes for it in matching):
            may = ", ".join(sorted(set().union(*(it.scopes for it in matching)))) or "nothing"
            message = f"this key may do: {may}. This route needs one whose scopes include {scope}"
            raise Problem(403, "forbidden", message, field="Authorization")
    elif scope == "embed":
        _refuse_foreign_pages(request)
    elif not _is_local(request):
        raise Problem(
            403,
            "forbidden",
            "without a key in FULLRANK_API_KEY or FULLRANK_API_KEYS this route answers on loopback only; "
            "set one and send it as a bearer token",
        )


def client_of(request: Request) -> int:
    """Tells clients apart for the monitor's sample: by their key, or without keys by their address."""
    context = context_of(request.scope)
    return hash(_token(request)) if context.front.grants else hash(context.peer)


def authorize_scrape(request: Request) -> None:
    """Check that a request may read metrics: any may, unless a key names that scope. Raises Problem 401 or 403."""
    if any(it.named and "metrics" in it.scopes for it in context_of(request.scope).front.grants):
        authorize(request, "metrics")


def _token(request: Request) -> bytes:
    scheme, _, token = (header_of(request, b"authorization") or "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_local(request: Request) -> bool:
    """Whether a request came over loopback, not through a proxy, and not from another site's page in a local browser.

    Such a page calls from loopback too, so Host and Origin are checked: one of them names the site.
    """
    context = context_of(request.scope)
    headers = request.headers
    origin = headers.get("origin")
    return (
        _is_loopback(context.peer)
        and all(map(_is_loopback, _forwarded_for(request.scope)))
        and _is_loopback(_host_of(f"//{headers.get('host', '')}"))
        and (origin is None or _is_loopback(_host_of(origin)))
    )


def _refuse_foreign_pages(request: Request) -> None:
    """Raise Problem 403 for a page in a browser whose origin is neither this service nor one of cors_origins.

    Only browsers send Origin, and they send it with every POST. A page whose origin equals the request's host is let in
    only if the host is an address or localhost: an attacker can make any other name point here.
    """
    origin = header_of(request, b"origin")
    if origin is None:
        return
    allowed = context_of(request.scope).service.settings.cors_origins
    if "*" in allowed or origin in allowed:
        return
    page, port = _place_of(origin)
    host, own_port = _place_of(f"{origin.partition('://')[0]}://{header_of(request, b'host') or ''}")
    if (_is_loopback(host) and _is_loopback(page)) or (_is_address(host) and (page, port) == (host, own_port)):
        return
    raise Problem(
        403,
        "forbidden",
        f"a page from {origin!r} may not call this service; add its origin to FULLRANK_CORS_ORIGINS, or set a key",
        field="Origin",
    )


def _forwarded_for(scope: Asgi) -> Iterable[str]:
    """The clients that proxies say they call for: an address each, or what stands in its place."""
    for name, value in scope["headers"]:
        if name.decode("latin-1") in FORWARDED:
            for part in value.decode("latin-1").split(","):
                yield _host_of("//" + part.strip()) if name != b"forwarded" else part


def _place_of(url: str) -> tuple[str, int | None]:
    """Host and port of a URL or an origin; "" where it has none."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return "", None


def _host_of(url: str) -> str:
    return _place_of(url)[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
