"""The fast path: the operations that make up nearly all traffic, without FastAPI's machinery around them.

FastAPI declares every operation; for those that it can, `FastPath` lays out at start-up what FastAPI works out anew at
every request: which route a path belongs to, and in which order the endpoint's dependencies are to be asked. The
functions that run are the same, in the same order, so the answers are the same bytes. An operation that needs more
(its parameters parsed by FastAPI, a dependency that is cleaned up afterwards, a model serialized) is left to FastAPI,
and so is every path that is not one of these operations'. `FAST_PATH=false` leaves everything to it.

docs/decisions/0070-fast-path.md has the reasons and what it saves.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from starlette.convertors import UUIDConvertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from ..models.base import QuickUUID

Call = Callable[..., Awaitable[Any]]
# What most dependencies ask for.
_REQUEST: Final = (0,)
# What a dependency may not ask for here: FastAPI parses, validates or provides it.
_BEYOND: Final = (
    "query_params",
    "header_params",
    "cookie_params",
    "body_params",
    "websocket_param_name",
    "http_connection_param_name",
    "response_param_name",
    "background_tasks_param_name",
    "security_scopes_param_name",
    "own_oauth_scopes",
)


class _NotPlain(Exception):
    """The operation needs more than the fast path has."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, laid out.

    A step's places point at what was there before it: the request, then the parts of the path, then what the earlier
    steps gave. `route` is what the application makes of the declared one.
    """

    route: RouteContext
    steps: tuple[tuple[Call, tuple[int, ...]], ...]
    endpoint: Call
    places: tuple[int, ...]


class FastPath:
    """Finds and answers the operations of these routers that can do without FastAPI's machinery.

    `app` has to include the routers already: what it includes them with (a prefix, dependencies) counts here too.
    """

    def __init__(self, app: FastAPI, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._fixed: dict[tuple[str, str], Operation] = {}
        self._by_id: dict[Pattern[str], dict[str, Operation]] = {}
        for operation in _laid_out(app, routers):
            route = operation.route
            for method in route.methods or ():
                if route.param_convertors:
                    self._by_id.setdefault(route.path_regex, {})[method] = operation
                else:
                    self._fixed[method, str(route.path)] = operation

    @property
    def operations(self) -> dict[str, Operation]:
        """By their names."""
        found = [*self._fixed.values(), *(one for some in self._by_id.values() for one in some.values())]
        return {str(operation.route.name): operation for operation in found}

    def find(self, scope: Scope) -> tuple[Operation, tuple[Any, ...]] | None:
        """The operation that this request asks for and the parts of its path; None where FastAPI is to look."""
        if scope.get("root_path") or self._app.dependency_overrides:
            return None
        method, path = scope["method"], scope["path"]
        operation = self._fixed.get((method, path))
        if operation is not None:
            return operation, ()
        for pattern, operations in self._by_id.items():
            match = pattern.match(path)
            if match is not None and method in operations:
                return operations[method], tuple(map(QuickUUID, match.groups()))
        return None

    async def answer(
        self, found: tuple[Operation, tuple[Any, ...]], scope: Scope, receive: Receive
    ) -> Response:
        """What the endpoint answers, or what the application's handlers answer to its exception.

        Raises what has no handler.
        """
        operation, parts = found
        scope["route"] = operation.route
        request = Request(scope, receive)
        known = [request, *parts]
        try:
            for call, places in operation.steps:
                if places == _REQUEST:
                    known.append(await call(request))
                else:
                    known.append(await call(*[known[place] for place in places]))
            response: Response = await operation.endpoint(*[known[place] for place in operation.places])
        except Exception as error:
            for kind in type(error).__mro__:
                handler: Any = self._app.exception_handlers.get(kind)
                # What nobody expects goes on to the middleware, as FastAPI lets it.
                if handler is not None and kind is not Exception:
                    answered: Response = await handler(request, error)
                    return answered
            raise
        return response


def _laid_out(app: FastAPI, routers: Sequence[APIRouter]) -> Iterator[Operation]:
    meant = [route for router in routers for route in router.routes]
    for route in iter_route_contexts(app.routes):
        if route.original_route not in meant or not isinstance(route.original_route, APIRoute):
            continue
        # FastAPI would make anything else into an answer.
        gives = inspect.signature(route.original_route.endpoint).return_annotation
        if not (isinstance(gives, type) and issubclass(gives, Response)):
            continue
        try:
            yield _operation(route)
        except _NotPlain:
            continue


def _operation(route: RouteContext) -> Operation:
    names = list(route.param_convertors)
    if not all(isinstance(convertor, UUIDConvertor) for convertor in route.param_convertors.values()):
        raise _NotPlain
    steps: list[tuple[Call, tuple[int, ...]]] = []
    there: dict[int, int] = {}

    def places_of(dependant: Dependant) -> tuple[int, ...]:
        """Lays out what this one needs, in FastAPI's order: each dependency before what depends on it, once."""
        if any(getattr(dependant, beyond) for beyond in _BEYOND):
            raise _NotPlain
        given: dict[str, int] = {}
        for needed in dependant.dependencies:
            place = place_of(needed)
            # A router's own dependencies have no name: nobody is given what they give.
            if needed.name is not None:
                given[needed.name] = place
        if dependant.request_param_name:
            given[dependant.request_param_name] = 0
        for field in dependant.path_params:
            if field.field_info.annotation is not UUID:
                raise _NotPlain
            given[field.name] = 1 + names.index(field.alias)
        return _in_order(_function(dependant), given)

    def place_of(dependant: Dependant) -> int:
        call = _function(dependant)
        if dependant.use_cache and id(call) in there:
            return there[id(call)]
        steps.append((call, places_of(dependant)))
        place = there[id(call)] = len(names) + len(steps)
        return place

    places = places_of(route.dependant)
    return Operation(route, tuple(steps), _function(route.dependant), places)


def _function(dependant: Dependant) -> Call:
    call = dependant.call
    assert call is not None
    if not (inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)):
        raise _NotPlain
    return call


def _in_order(call: Call, given: Mapping[str, int]) -> tuple[int, ...]:
    """The places in the order of the function's parameters, which are given all and by their places."""
    parameters = inspect.signature(call).parameters
    if parameters.keys() != given.keys() or any(one.kind is one.KEYWORD_ONLY for one in parameters.values()):
        raise _NotPlain
    return tuple(given[name] for name in parameters)
