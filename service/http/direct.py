"""The hot routes, past the framework's middleware, routing and dependencies: those cost more than our own work.

They stay in FastAPI for its OpenAPI document; their handlers take the request and check it themselves.
"""

from collections.abc import Iterable

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.failures import ServiceError
from service.http.access import require_key
from service.http.errors import Problem, respond


class DirectAPI(FastAPI):
    """FastAPI, but POST requests for some of its routes are answered directly, after the key's check."""

    _direct: dict[str, APIRoute]
    _outer: ASGIApp

    def answer_directly(self, routes: Iterable[object]) -> None:
        """Answer POST requests for these routes directly, but for the middleware added until now."""
        self._direct = {it.path: it for it in routes if isinstance(it, APIRoute) and it.methods == {"POST"}}
        self._outer = self._answer
        for it in reversed(self.user_middleware):
            self._outer = it.cls(self._outer, *it.args, **it.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._direct:
            scope["app"], scope["route"] = self, self._direct[scope["path"]]
            await self._outer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            await require_key(request)
            response = await scope["route"].endpoint(request)
        except (Problem, ServiceError) as problem:
            response = respond(scope["path"], problem)
        await response(scope, receive, send)
