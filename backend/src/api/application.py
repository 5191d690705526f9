"""FastAPI inside our middleware: with nothing around it, so that what the middleware answers itself costs no layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import RequestError
from . import problems
from .middleware import RequestMiddleware


class Application(FastAPI):
    """Every request passes a `RequestMiddleware` first, made with the arguments of `passing`.

    Middleware added in FastAPI's own way (`add_middleware`) comes after it, and only where FastAPI answers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Read several times a request; of Starlette's own class each attribute takes two steps of Python.
        self.state = cast(State, SimpleNamespace())
        self._passing: dict[str, Any] = {}
        problems.install(self)
        # FastAPI's outermost layer answers before the middleware hears of it, in plain text unless told otherwise.
        self.add_exception_handler(Exception, _unexpected)

    def passing(self, **arguments: Any) -> None:
        """Says how requests pass: the arguments of `RequestMiddleware` but for the first. Before the first request."""
        self._passing = arguments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.middleware_stack is not None and not self.root_path:
            # As FastAPI and Starlette do it, in one call instead of three.
            scope["app"] = self
            await self.middleware_stack(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        return RequestMiddleware(super().build_middleware_stack(), **self._passing)


async def _unexpected(request: Request, _: Exception) -> Response:
    return problems.answer(RequestError(), request.state.request_id)
