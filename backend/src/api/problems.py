"""Errors become application/problem+json (RFC 9457).

A body has `type` (a path on this service, where a page explains it), `title`, `status`, `request_id`, where
there is more to say `detail`, and `errors` for bad input. Every sentence is ours and chosen by the error's
type: what a client sent is never sent back, because it may hold a password, a megabyte, or text that no
encoder takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..errors import InputFault, Invalid, LogInFailed, NotFound, RequestError, Unauthenticated

MEDIA_TYPE = "application/problem+json"
MAX_LISTED_FAULTS = 20


class Malformed(RequestError):
    status = 400
    slug = "malformed"
    title = "The request cannot be read"
    meaning = "It is not HTTP as it has to be, or its body is not JSON in UTF-8 or is nested too deeply."


class MethodNotAllowed(RequestError):
    status = 405
    slug = "method-not-allowed"
    title = "This method is not answered here"
    meaning = "The path exists; the `Allow` header lists the methods that it answers."

    def __init__(self, allow: Sequence[str]) -> None:
        super().__init__()
        self.allow = allow


class TooSlow(RequestError):
    status = 408
    slug = "too-slow"
    title = "The request did not arrive in time"
    meaning = (
        "Its headers took longer than HEADER_TIMEOUT_SECONDS, or its body came slower than MIN_BYTES_PER_SECOND. The "
        "connection is closed; what had not arrived as a whole was not done."
    )


class TooLarge(RequestError):
    status = 413
    slug = "too-large"
    title = "The body is too large"
    meaning = (
        "The body is over the limit that MAX_BODY_BYTES sets (for a batch MAX_BATCH_BYTES, for an import "
        "MAX_IMPORT_BYTES); it was not read to its end."
    )


class UnsupportedMediaType(RequestError):
    status = 415
    slug = "unsupported-media-type"
    title = "The body is of another type than is asked for"
    meaning = (
        "Send JSON with `Content-Type: application/json`, an import with `application/x-ndjson`: in UTF-8, and not "
        "compressed."
    )


class HeadersTooLarge(RequestError):
    status = 431
    slug = "headers-too-large"
    title = "The request's headers are too large"
    meaning = "The request line and the headers together are over 32 KiB, or more than 100 headers were sent."


class ProblemFault(BaseModel):
    pointer: str = Field(description="A JSON Pointer (RFC 6901) into the body, or the name of the parameter.")
    detail: str


class Problem(BaseModel):
    """What went wrong, as RFC 9457 describes it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "/problems/not-found",
                "title": NotFound.title,
                "status": NotFound.status,
                "request_id": "5f2b9c01d7e84a60-1a",
            }
        }
    )

    type: str = Field(description="A path on this service that explains this kind of problem.")
    title: str
    status: int
    request_id: str = Field(description="The same as the X-Request-ID header; it leads to the log line.")
    detail: str | None = None
    errors: list[ProblemFault] | None = Field(None, description="What is wrong with the input, 20 at most.")
    constraint: str | None = Field(None, description="With `conflict`: the constraint that refuses.")


def kinds() -> list[type[RequestError]]:
    """Every kind of problem that this service can answer, by status and slug; the root stands for all 500."""

    def walk(kind: type[RequestError]) -> Iterator[type[RequestError]]:
        if "slug" in vars(kind) and kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
            yield kind
        for child in kind.__subclasses__():
            yield from walk(child)

    return sorted(walk(RequestError), key=lambda kind: (kind.status, kind.slug))


def kind_for(status: int) -> type[RequestError] | None:
    """The kind that stands for a bare HTTP status, as Starlette raises it."""
    return {400: Malformed, 404: NotFound, 413: TooLarge, 415: UnsupportedMediaType, 422: Invalid}.get(status)


def path_of(kind: type[RequestError]) -> str:
    return f"/problems/{kind.slug}"


def example(kind: type[RequestError]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": path_of(kind),
        "title": kind.title,
        "status": kind.status,
        "request_id": "5f2b9c01d7e84a60-1a",
    }
    if kind is Invalid:
        body["errors"] = [{"pointer": "/title", "detail": "Is required."}]
    return body


def responses(*named: type[RequestError]) -> dict[int | str, dict[str, Any]]:
    """What `responses=` of a route or router takes, so that the operation lists these problems in OpenAPI."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for kind in named:
        entry = by_status.setdefault(
            kind.status,
            {
                "description": kind.title + ".",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        examples = entry["content"][MEDIA_TYPE]["examples"]
        if examples and kind.slug not in examples:
            entry["description"] += f" {kind.title}."
        examples[kind.slug] = {"summary": kind.title, "value": example(kind)}
    return by_status


def body_of(error: RequestError, request_id: str) -> bytes:
    body: dict[str, Any] = {
        "type": path_of(type(error)),
        "title": error.title,
        "status": error.status,
        "request_id": request_id,
    }
    if error.detail:
        body["detail"] = error.detail
    if isinstance(error, Invalid) and error.faults:
        body["errors"] = [
            {"pointer": f.pointer, "detail": f.detail} for f in error.faults[:MAX_LISTED_FAULTS]
        ]
    if constraint := getattr(error, "constraint", None):
        body["constraint"] = constraint
    # ASCII escapes keep a lone surrogate, wherever it may come from, from breaking the encoder.
    return json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def headers_of(error: RequestError) -> dict[str, str]:
    headers = {"cache-control": "no-store"}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = _challenge(error)
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = ", ".join(error.allow)
    if isinstance(error, TooLarge):
        # The rest of the body is not worth reading, so the connection cannot be used again.
        headers["connection"] = "close"
    return headers


def _challenge(error: Unauthenticated) -> str:
    """RFC 6750, 3.1: a request without any token learns no error code; one with a bad token does."""
    realm = 'Bearer realm="groundwork"'
    return (
        realm
        if error.reason == "no-token" or isinstance(error, LogInFailed)
        else f'{realm}, error="invalid_token"'
    )


def answer(error: RequestError, request_id: str) -> Response:
    return Response(
        body_of(error, request_id), error.status, headers=headers_of(error), media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Makes this module answer for every error that FastAPI, Starlette or our services raise on purpose."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_bad_input)
    app.add_exception_handler(HTTPException, _on_http_exception)


def _finish(request: Request, error: RequestError) -> Response:
    # The middleware adds the problem and its reason to the request's one log line.
    request.state.problem = error
    return answer(error, request.state.request_id)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _finish(request, error)


async def _on_bad_input(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(fault["type"] == "json_invalid" for fault in found):
        return _finish(request, Malformed("The body is not valid JSON."))
    # FastAPI hands the body on as bytes when its Content-Type does not say JSON.
    if isinstance(error.body, bytes) and any(fault["loc"][:1] == ("body",) for fault in found):
        return _finish(request, UnsupportedMediaType())
    return _finish(request, invalid(found))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == MethodNotAllowed.status:
        return _finish(request, MethodNotAllowed(allowed_methods(request)))
    if status < 200 or status in (204, 304):
        response = Response(status_code=status)
    elif kind := kind_for(status):
        response = _finish(request, kind())
    else:
        # The exception's own `detail` may quote anything, so only the number's standard phrase is said.
        body = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "request_id": request.state.request_id,
        }
        response = Response(json.dumps(body), status, media_type=MEDIA_TYPE)
    for name, value in (error.headers or {}).items():
        response.headers.setdefault(name, value)
    return response


def allowed_methods(request: Request) -> list[str]:
    """Every method that some route answers at this request's path; HEAD goes wherever GET goes."""
    path: str = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    methods: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        pattern: re.Pattern[str] | None = getattr(route, "path_regex", None)
        if pattern is not None and pattern.match(path):
            methods |= route.methods or set()
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)


# Our sentence for each type of Pydantic's; braces are filled from the rule (`max_length`), never from input.
SENTENCES: Mapping[str, str] = {
    "missing": "Is required.",
    "extra_forbidden": "Has a field that is not known here.",
    "string_type": "Has to be a text.",
    "string_too_short": "Has to have at least {min_length} character(s).",
    "string_too_long": "Has to have at most {max_length} characters.",
    "string_pattern_mismatch": "Does not have the form that is asked for.",
    "string_unicode": "Has to be valid Unicode.",
    "bool_type": "Has to be true or false.",
    "bool_parsing": "Has to be true or false.",
    "int_type": "Has to be a whole number.",
    "int_parsing": "Has to be a whole number.",
    "int_parsing_size": "Is a number out of range.",
    "int_from_float": "Has to be a whole number.",
    "float_type": "Has to be a number.",
    "float_parsing": "Has to be a number.",
    "finite_number": "Has to be a finite number.",
    "greater_than": "Has to be greater than {gt}.",
    "greater_than_equal": "Has to be {ge} or more.",
    "less_than": "Has to be less than {lt}.",
    "less_than_equal": "Has to be {le} or less.",
    "multiple_of": "Has to be a multiple of {multiple_of}.",
    "uuid_type": "Has to be a UUID.",
    "uuid_parsing": "Has to be a UUID.",
    "datetime_type": "Has to be a date and time as RFC 3339 writes it.",
    "datetime_parsing": "Has to be a date and time as RFC 3339 writes it.",
    "datetime_from_date_parsing": "Has to be a date and time as RFC 3339 writes it.",
    "timezone_aware": "Has to carry an offset from UTC.",
    "list_type": "Has to be an array.",
    "too_short": "Has to have at least {min_length} item(s).",
    "too_long": "Has to have at most {max_length} items.",
    "dict_type": "Has to be an object.",
    "model_type": "Has to be an object.",
    "model_attributes_type": "Has to be an object.",
    "none_required": "Has to be null.",
    "union_tag_not_found": "Has to have the field {discriminator}.",
    "union_tag_invalid": "Has to be one of: {expected_tags}.",
    "text_nul": "Has to be without the character U+0000.",
    "text_surrogate": "Has to be valid Unicode.",
    "timestamp_range": "Has to lie in the years 1 to 9999 in UTC.",
    "password_too_long": "Has to have at most {most} bytes in UTF-8.",
    "password_common": "Is one of the most common passwords, which are tried first.",
    "nothing_changed": "Has to name an e-mail, a password, or both.",
    "text_blank": "Has to hold more than white space.",
    "enum": "Has to be one of: {expected}.",
    "literal_error": "Has to be one of: {expected}.",
}
OTHERWISE = "Is not acceptable."


def invalid(found: Sequence[Mapping[str, Any]]) -> Invalid:
    """Pydantic's error records as one error of ours; each `loc` begins with the place (`body`, `query`, ...)."""
    detail = None
    if len(found) > MAX_LISTED_FAULTS:
        detail = f"The first {MAX_LISTED_FAULTS} of {len(found)} faults are listed."
    return Invalid(detail, faults=[input_fault(fault) for fault in found[:MAX_LISTED_FAULTS]])


def input_fault(fault: Mapping[str, Any]) -> InputFault:
    """One of Pydantic's error records as ours: where, and a sentence that holds nothing of the input."""
    place, *steps = fault["loc"]
    kind = fault["type"]
    sentence = SENTENCES.get(kind, OTHERWISE)
    rule = fault.get("ctx") or {}
    if "{" in sentence:
        try:
            sentence = sentence.format_map(rule)
        except KeyError:
            sentence = OTHERWISE
    if place != "body":
        return InputFault(pointer=str(steps[0]) if steps else place, detail=f"In the {place}: {sentence}")
    if kind == "extra_forbidden":
        # The last step is the unknown field's own name, which is input; its parent is not.
        steps = steps[:-1]
    escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
    return InputFault(pointer="".join(f"/{step}" for step in escaped), detail=sentence)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Makes an OpenAPI document tell the truth about errors, and returns it.

    FastAPI's default 422 shape is replaced, and each operation lists what the middleware and FastAPI can
    answer for it: 500 always, 422 where there is input, 400, 413 and 415 where there is a body.
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas["Problem"] = schema
    for operations in document.get("paths", {}).values():
        for operation in operations.values():
            listed = operation.setdefault("responses", {})
            if "application/json" in listed.get("422", {}).get("content", {}):
                del listed["422"]
            implied: list[type[RequestError]] = [RequestError]
            if "requestBody" in operation:
                implied += [Malformed, TooLarge, UnsupportedMediaType]
            # A path that has to hold a UUID, and does not, is another path: 404.
            checked = [one for one in operation.get("parameters", ()) if not _is_header_or_uuid(one)]
            if "requestBody" in operation or checked:
                implied.append(Invalid)
            for status, entry in responses(*implied).items():
                there = listed.setdefault(str(status), entry)
                if there is not entry and MEDIA_TYPE in there.get("content", {}):
                    # Some problems of this status are listed already, and these are others.
                    said = there["content"][MEDIA_TYPE]["examples"]
                    if not entry["content"][MEDIA_TYPE]["examples"].keys() <= said.keys():
                        there["description"] = f"{entry['description']} {there['description']}"
                        said.update(entry["content"][MEDIA_TYPE]["examples"])
            operation["responses"] = dict(sorted(listed.items()))
    return document


def _is_header_or_uuid(parameter: Mapping[str, Any]) -> bool:
    return bool(parameter["in"] == "header" or parameter["schema"].get("format") == "uuid")
