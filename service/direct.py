"""The hot routes, past the framework's routing and dependencies, which cost more than the service's own work on them.

They stay in FastAPI for its OpenAPI document; their handlers take the request and check it themselves.
"""

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access import require_key
from service.errors import Problem, respond


class Direct:
    """ASGI middleware that answers POST requests for `routes` itself, after the key's check."""

    def __init__(self, app: ASGIApp, routes: Iterable[object]) -> None:
        self.app = app
        self.routes = {it.path: it for it in routes if isinstance(it, APIRoute) and it.methods == {"POST"}}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            await require_key(request)
            response = await route.endpoint(request)
        except Problem as problem:
            response = respond(scope["path"], problem)
        await response(scope, receive, send)
