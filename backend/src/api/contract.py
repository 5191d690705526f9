"""OpenAPI that is true: what FastAPI cannot see of an operation, said by those who do it.

A dependency with `describe(operation)` adds its parameters or its body to the operation and gives the shape, if
any, whose schema the document needs. `answers`, `header` and `links` are the words for what an operation answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

JSON: Final = "application/json"
_REFERENCE: Final = "#/components/schemas/{model}"
_HEADERS: Final = {
    "401": ("WWW-Authenticate", '`Bearer`, with `error="invalid_token"` when there was a token.'),
    "429": ("Retry-After", "Seconds."),
    "503": ("Retry-After", "Seconds."),
}


@runtime_checkable
class Described(Protocol):
    """A dependency that can tell what it reads of a request."""

    def describe(self, operation: dict[str, Any]) -> type[BaseModel] | None: ...


def header(name: str, description: str) -> dict[str, Any]:
    return {name: {"description": description, "schema": {"type": "string"}}}


def links(description: str, source: str, *operations: str) -> dict[str, Any]:
    """From the task in an answer, its id at `source` (a runtime expression), to what can be done with it."""
    return {
        operation: {"operationId": operation, "parameters": {"task_id": source}, "description": description}
        for operation in operations
    }


def answers(
    status: int,
    description: str,
    example: Any = None,
    *,
    model: type[BaseModel] | None = None,
    media_type: str = JSON,
    headers: Sequence[dict[str, Any]] = (),
    linked: dict[str, Any] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """What `responses=` takes for one success; the shape is `model`, or the operation's `response_model`."""
    entry: dict[str, Any] = {"description": description}
    if model is not None:
        entry["model"] = model
    if example is not None:
        content = {"examples": {"example": {"value": example}}}
        # Lines of JSON have no schema of their own in OpenAPI 3.1; JSON's comes from the shape.
        entry["content"] = {
            media_type: content if media_type == JSON else {"schema": {"type": "string"}, **content}
        }
    if headers:
        entry["headers"] = {name: value for each in headers for name, value in each.items()}
    if linked:
        entry["links"] = linked
    return {status: entry}


def describe(document: dict[str, Any], routes: Sequence[BaseRoute]) -> None:
    """Adds what dependencies say of themselves; before `problems.complete`, which looks at bodies and parameters."""
    shapes: dict[str, type[BaseModel]] = {}
    for route in iter_route_contexts(routes):
        dependant = getattr(route, "dependant", None)
        item = document["paths"].get(getattr(route, "path_format", None), {})
        if dependant is None:
            continue
        for method in route.methods or ():
            operation = item.get(method.lower())
            if operation is None:
                continue
            _whole_examples(operation, route.responses)
            for dependency in _described(dependant):
                shape = dependency.describe(operation)
                if shape is not None:
                    shapes[shape.__name__] = shape
    _, found = models_json_schema(
        [(shape, "validation") for shape in shapes.values()], ref_template=_REFERENCE
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in found.get("$defs", {}).items():
        if "description" in schema:
            # What follows the first paragraph of a docstring is for who reads the code.
            schema["description"] = schema["description"].partition("\n\n")[0]
        schemas.setdefault(name, schema)


def finish(document: dict[str, Any]) -> None:
    """After `problems.complete`: the headers of problems, and that an operation without a lock needs no key."""
    for item in document["paths"].values():
        for operation in item.values():
            operation.setdefault("security", [])
            for status, (name, description) in _HEADERS.items():
                if status in operation["responses"]:
                    operation["responses"][status].setdefault("headers", header(name, description))


def _whole_examples(operation: dict[str, Any], given: Mapping[int | str, dict[str, Any]]) -> None:
    """Puts the examples of answers back as they were given: FastAPI leaves out what is null in them."""
    for status, entry in given.items():
        shown = operation["responses"].get(str(status), {}).get("content", {})
        for media_type, content in entry.get("content", {}).items():
            if "examples" in content and media_type in shown:
                shown[media_type]["examples"] = content["examples"]


def _described(dependant: Dependant) -> Iterator[Described]:
    for inner in dependant.dependencies:
        yield from _described(inner)
        if isinstance(inner.call, Described):
            yield inner.call
