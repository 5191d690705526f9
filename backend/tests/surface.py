"""Everything that a client can put a value into, found by walking the routes and OpenAPI: what is added is walked too.

for operation in operations(app):
    for place in places(operation): answer = await Wire(app).ask(place.filled(text, headers))

Requests go to the application as the server hands them over, so that paths and headers can hold any byte.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from urllib.parse import quote, quote_plus, unquote
from uuid import uuid4

import httpx
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from asking import hold
from src.api import contract

JSON: Final = "application/json"
VERBS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
# What a request may carry and no operation of ours reads: it has to make no difference.
IGNORED: Final = (
    "accept-encoding", "accept-language", "authentication-info", "cookie", "expect", "forwarded", "from",
    "if-modified-since", "if-range", "if-unmodified-since", "origin", "pragma", "prefer", "range", "referer", "te",
    "traceparent", "tracestate", "user-agent", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-prefix",
    "x-forwarded-proto", "x-http-method-override", "x-original-url", "x-real-ip", "x-requested-with", "x-rewrite-url",
    "x-unknown",
)  # fmt: skip
READ: Final = ("accept", "authorization", "content-encoding", "content-type", "idempotency-key", "if-match",
               "if-none-match", "x-request-id")  # fmt: skip
Pointer = tuple[str | int, ...]


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return next((value for given, value in self.headers if given == name), None)

    def held(self, *, keyed: bool = False) -> Answer:
        """Holds it to the contract of every answer."""
        hold(
            httpx.Response(
                self.status,
                headers=self.headers,
                content=self.body,
                request=httpx.Request("GET", "http://test/"),
            ),
            keyed=keyed,
        )
        return self


@dataclass
class Asked:
    """A request as it goes over the wire."""

    verb: str
    path: bytes
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""


class Wire:
    """Hands requests to the application as uvicorn does, in this process."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def ask(self, asked: Asked) -> Answer:
        headers = list(asked.headers)
        if asked.body and not any(name == b"content-length" for name, _ in headers):
            headers.append((b"content-length", b"%d" % len(asked.body)))
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": asked.verb, "path": unquote(asked.path.decode("ascii")), "raw_path": asked.path,
            "query_string": asked.query, "root_path": "", "headers": headers, "client": ("127.0.0.1", 9),
            "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        arriving = [{"type": "http.request", "body": asked.body, "more_body": False}]
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not arriving:
                await asyncio.Event().wait()  # The client stays until it has its answer.
            return arriving.pop()

        async def send(message: Any) -> None:
            said.append(message)

        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in said[1:])
        return Answer(
            said[0]["status"], [(bytes(name), bytes(value)) for name, value in said[0]["headers"]], body
        )


@dataclass(frozen=True)
class Operation:
    """One method of one route. `described` is what OpenAPI says of it: nothing, for pages."""

    verb: str
    template: str
    described: Mapping[str, Any]
    media_type: str | None
    schema: Mapping[str, Any]
    """Of the body, or of one line of it; with the definitions that it refers to under `$defs`."""

    @property
    def name(self) -> str:
        return f"{self.verb} {self.template}"

    @property
    def has_password(self) -> bool:
        """Whether its work may be slow on purpose."""
        return any("password" in str(place[-1]) for place in self.values() if place)

    def request(
        self,
        headers: Sequence[tuple[bytes, bytes]] = (),
        place: Pointer | None = None,
        value: Any = None,
        ids: Mapping[str, str] | None = None,
    ) -> Asked:
        """One that is as described, with `value` at this pointer into its body, and `ids` in its path."""
        sent = list(headers)
        body = b""
        if self.media_type is not None:
            sent.append((b"content-type", self.media_type.encode()))
            body = self.document(place, json.dumps(value).encode())
        path = self.template
        for name in _parameters(self.template):
            path = path.replace(f"{{{name}}}", (ids or {}).get(name) or str(uuid4()))
        return Asked(self.verb, path.encode("ascii"), headers=sent, body=body)

    def document(self, place: Pointer | None = None, value: bytes = b"null") -> bytes:
        """The least body that is as described, with this JSON, or what is none, at the pointer."""
        body = _least(self.schema, self.schema, place or ())
        if place is not None:
            body = _put(copy.deepcopy(body), place, _MARK)
        text = json.dumps(body).replace('"format:uuid"', json.dumps(str(uuid4())))
        text = text.replace("format:email", f"ana-{uuid4().hex}@example.com")
        written = text.encode().replace(json.dumps(_MARK).encode(), value)
        return written + b"\n" if self.media_type != JSON else written

    def values(self, kind: str = "string") -> list[Pointer]:
        """Pointers to every value of this JSON type in its body, those that may be absent included."""
        return list(dict.fromkeys(_pointers(self.schema, self.schema, kind))) if self.schema else []

    def query_names(self) -> list[str]:
        return [one["name"] for one in self.described.get("parameters", ()) if one["in"] == "query"]

    def header_names(self) -> list[str]:
        named = [one["name"].lower() for one in self.described.get("parameters", ()) if one["in"] == "header"]
        return list(dict.fromkeys([*named, *READ]))


_MARK: Final = "here stands the value"


def operations(app: FastAPI) -> list[Operation]:
    """Of every route that is registered, shown in OpenAPI or not."""
    document = app.openapi()
    found = []
    for route in iter_route_contexts(app.routes):
        template, methods = getattr(route, "path_format", None), getattr(route, "methods", None)
        if template is None:
            continue
        for verb in sorted(VERBS & set(methods or ())):
            described = document["paths"].get(template, {}).get(verb.lower(), {})
            content = described.get("requestBody", {}).get("content", {})
            media_type = next(iter(content), None)
            schema: dict[str, Any] = {}
            if media_type is not None:
                schema = dict(content[media_type].get("schema", {}))
                if media_type != JSON:
                    # OpenAPI has no word for lines, but who reads them knows what each is.
                    (shape,) = (
                        shape
                        for each in contract._described(route.dependant)
                        if (shape := each.describe({})) is not None
                    )
                    schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
                schema["components"] = document["components"]
            found.append(Operation(verb, template, described, media_type, schema))
    return found


def _parameters(template: str) -> list[str]:
    return [part.partition("}")[0] for part in template.split("{")[1:]]


def path_parameters(operation: Operation) -> list[str]:
    return _parameters(operation.template)


def in_path(operation: Operation, name: str, text: str, *, safe: str = "") -> bytes:
    """The path with this text for one parameter, percent-encoded but for `safe`, and ids for the others."""
    path = operation.template
    for other in _parameters(operation.template):
        value = quote(text.encode("utf-8", "surrogatepass"), safe=safe) if other == name else str(uuid4())
        path = path.replace(f"{{{other}}}", value)
    return path.encode("ascii")


def in_query(name: str, text: str) -> bytes:
    return f"{quote_plus(name)}={quote_plus(text.encode('utf-8', 'surrogatepass'))}".encode("ascii")


def in_header(text: str) -> bytes:
    """As a server would hand it over: what ends or breaks a header line never gets so far."""
    held = text.encode("utf-8", "surrogatepass")
    return bytes(byte for byte in held if byte not in b"\r\n\0").strip(b" \t")


# Bodies from schemas


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        inside: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            inside = inside[step]
        schema = inside
    return schema


def _choices(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of a schema without null, or itself alone."""
    schema = _resolved(schema, root)
    among = [_resolved(one, root) for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ()))]
    return [one for one in among if one.get("type") != "null"] or [schema]


def _least(schema: Mapping[str, Any], root: Mapping[str, Any], wanted: Pointer) -> Any:
    """A value of this schema: what is required, the ids, and what lies on the way to `wanted`."""
    # Of alternatives the first, unless they are the elements of a list, which then has each of them.
    schema = _choices(schema, root)[0]
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties", {})
        named = [
            name
            for name, one in properties.items()
            if name in schema.get("required", ()) or _is_id(one, root) or wanted[:1] == (name,)
        ]
        return {
            name: _least(properties[name], root, wanted[1:] if wanted[:1] == (name,) else ())
            for name in named
        }
    if kind == "array":
        return [
            _least(one, root, wanted[1:] if wanted[:1] == (number,) else ())
            for number, one in enumerate(_choices(schema.get("items", {}), root))
        ]
    if "const" in schema or "enum" in schema:
        return schema.get("const", next(iter(schema.get("enum", ())), None))
    if kind == "string":
        return _text(schema)
    if kind in ("integer", "number"):
        return schema.get("minimum", 1)
    return kind == "boolean" or None


def _is_id(schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    return any(one.get("format") == "uuid" for one in _choices(schema, root))


def _text(schema: Mapping[str, Any]) -> str:
    match schema.get("format"):
        case "uuid":
            return "format:uuid"
        case "email":
            return "format:email"
        case "date-time":
            return "2026-11-22T09:30:00Z"
    return "correct horse battery staple"[: schema.get("maxLength", 28)].ljust(
        schema.get("minLength", 0), "x"
    )


def _pointers(schema: Mapping[str, Any], root: Mapping[str, Any], kind: str) -> Iterator[Pointer]:
    for one in _choices(schema, root):
        if one.get("type") == "object" or "properties" in one:
            for name, inner in one.get("properties", {}).items():
                yield from ((name, *rest) for rest in _pointers(inner, root, kind))
        elif one.get("type") == "array":
            for number, item in enumerate(_choices(one.get("items", {}), root)):
                yield from ((number, *rest) for rest in _pointers(item, root, kind))
        elif kind in (one.get("type"), "any"):
            yield ()


def _put(value: Any, place: Pointer, new: Any) -> Any:
    if not place:
        return new
    value[place[0]] = _put(value[place[0]], place[1:], new)
    return value


def at(value: Any, place: Pointer) -> Any:
    """What stands at the pointer; None where it leads nowhere."""
    for step in place:
        if isinstance(value, dict):
            value = value.get(str(step))
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value
