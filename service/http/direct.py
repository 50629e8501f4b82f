"""A FastAPI app that answers hot routes without FastAPI's middleware, routing and dependencies, for speed.

These routes are also declared in FastAPI, for its OpenAPI document. Their handlers take the raw request and check it
themselves.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.failures import ServiceError
from service.http.access import authorize
from service.http.context import CONTEXT, Context, Front
from service.http.errors import Problem, respond


class DirectAPI(FastAPI):
    """A FastAPI app that gives every request a context, and answers POST requests for some routes directly."""

    _direct: dict[str, APIRoute]
    _outer: ASGIApp

    def __init__(self, front: Front, **options: Any) -> None:
        super().__init__(**options)
        self.front = front

    def answer_directly(self, routes: Iterable[object]) -> None:
        """Answer POST requests for these routes directly, through no middleware but that added until now."""
        self._direct = {it.path: it for it in routes if isinstance(it, APIRoute) and it.methods == {"POST"}}
        self._outer = self._answer
        for it in reversed(self.user_middleware):
            self._outer = it.cls(self._outer, *it.args, **it.kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if CONTEXT not in scope:  # behind another server, or in a test
            client = scope.get("client")
            scope[CONTEXT] = Context(self.front, client[0] if client else None)
        try:
            if scope["method"] == "POST" and scope["path"] in self._direct:
                scope["app"], scope["route"] = self, self._direct[scope["path"]]
                await self._outer(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)
        finally:
            scope[CONTEXT].release()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            authorize(request, "embed")
            response = await scope["route"].endpoint(request)
        except (Problem, ServiceError) as problem:
            response = respond(scope["path"], problem)
        await response(scope, receive, send)
