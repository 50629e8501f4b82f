"""Who may call: a key with the route's scope, where keys are set, decided before any of the body is read.

Without keys, routes that administer or reveal state answer on loopback only, and no page in a browser may use any
route but from where it is allowed to.
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

from service.http.context import context_of
from service.http.errors import Problem
from service.keys import Scope

FORWARDED = ("x-forwarded-for", "x-real-ip", "forwarded")


class Guarded(APIRoute):
    """A route of FastAPI's that asks for a key of its scope first. FastAPI would read the body before it asked."""

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
    """Let a request pass that may do what `scope` says. Raises Problem 401 or 403."""
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


def authorize_scrape(request: Request) -> None:
    """Let everybody read metrics, unless some key is there for it by name. Raises Problem 401 or 403."""
    if any(it.named and "metrics" in it.scopes for it in context_of(request.scope).front.grants):
        authorize(request, "metrics")


def _token(request: Request) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_local(request: Request) -> bool:
    """Whether it came over loopback, for nobody else, and from no page of another site in a local browser.

    Host and Origin are asked too: such a page comes from loopback, but names itself in one of them.
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
    """Raises Problem 403 for a page in a browser that is neither this service's own nor one of cors_origins.

    Only browsers send Origin, and they send it with every POST. A page that calls by this service's own name is let in
    if the name is an address or localhost: any other name may be the attacker's, made to point here.
    """
    origin = request.headers.get("origin")
    if origin is None:
        return
    allowed = context_of(request.scope).service.settings.cors_origins
    if "*" in allowed or origin in allowed:
        return
    page, port = _place_of(origin)
    host, own_port = _place_of(f"{origin.partition('://')[0]}://{request.headers.get('host', '')}")
    if (_is_loopback(host) and _is_loopback(page)) or (_is_address(host) and (page, port) == (host, own_port)):
        return
    raise Problem(
        403,
        "forbidden",
        f"a page from {origin!r} may not call this service; add its origin to FULLRANK_CORS_ORIGINS, or set a key",
        field="Origin",
    )


def _forwarded_for(scope: Asgi) -> Iterable[str]:
    """For whom a proxy says that it calls: an address each, or what stands in its place."""
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
