"""FastAPI inside our middleware: with nothing around it, so that what the middleware answers itself costs no layer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ..errors import RequestError
from . import problems
from .middleware import RequestMiddleware


class Application(FastAPI):
    """Every request passes a `RequestMiddleware` first, made with the arguments of `passing`.

    Middleware added in FastAPI's own way (`add_middleware`) comes after it, and only where FastAPI answers.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._passing: dict[str, Any] = {}
        problems.install(self)
        # FastAPI's outermost layer answers before the middleware hears of it, in plain text unless told otherwise.
        self.add_exception_handler(Exception, _unexpected)

    def passing(self, **arguments: Any) -> None:
        """Says how requests pass: the arguments of `RequestMiddleware` but for the first. Before the first request."""
        self._passing = arguments

    def build_middleware_stack(self) -> ASGIApp:
        return RequestMiddleware(super().build_middleware_stack(), **self._passing)


async def _unexpected(request: Request, _: Exception) -> Response:
    return problems.answer(RequestError(), request.state.request_id)
