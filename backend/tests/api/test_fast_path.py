"""The fast path gives the answers that FastAPI gives, byte for byte, and knows what it cannot answer."""

# FastAPI reads the annotations of what is declared here, so they stay real types.

import json
import random
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final
from uuid import UUID, uuid5

import pytest
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from starlette.responses import Response

from src.api import tasks
from src.api.fast_path import FastPath
from src.api.middleware import route_of
from src.config.settings import Settings, load_settings
from src.main import create_app
from src.services import signing
from surface import Answer, Asked, Wire

KEY: Final = signing.new_key()
REQUESTS: Final = 1000
_SPACE: Final = UUID("6f1c2f2e-0d7a-4c39-9f63-0c1f4c1d9b52")
ANA, BOB = uuid5(_SPACE, "ana"), uuid5(_SPACE, "bob")
IDS: Final = [str(uuid5(_SPACE, str(number))) for number in range(3)]

# fmt: off
PATHS: Final = [
    *["/v1/tasks/{one}"] * 20, *["/v1/tasks"] * 12, "/v1/tasks/batch", "/v1/tasks/export", "/v1/tasks/import",
    "/v1/tasks/", "/v1/nothing", "/v1/tasks/{upper}", "/v1/tasks/{bare}", "/v1/tasks/{one}x", "/v1/tasks/%2{one}",
    "/v1/tasks/{one}%0A", "/v1/tasks%0A", "/v1/tasks/{one}/", "/v1/tasks/nobody", "//v1/tasks",
]
QUERIES: Final = [
    "", "", "", "limit=2", "limit=2&count=exact", "limit=0", "nonsense=1", "sort=updated_at&order=asc&limit=3",
    "limit=2&cursor={cursor}", "cursor=junk", "q=a&limit=5", "is_completed=true", "limit=1&limit=2",
]
# fmt: on

# What differs from one run to the next without meaning anything.
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_TAG: Final = re.compile(r'(?<=^")[^"]+(?="$)|(?<="etag":")[^"]+(?=")')
_CURSOR: Final = re.compile(r'(?<=cursor=)[\w.-]+|(?<="next_cursor":")[^"]+(?=")')


class Side:
    """One application on a database of its own, with the names that were given to what it made up."""

    def __init__(self, app: FastAPI) -> None:
        self.wire = Wire(app)
        self.names: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.cursor = "none"

    async def answer(self, asked: Asked) -> Answer:
        answer = await self.wire.ask(asked)
        etag = answer.header(b"etag")
        if etag is not None and answer.status in (200, 201):
            self.tags[json.loads(answer.body)["id"] if answer.body else ""] = etag.decode()
        if cursor := _CURSOR.search(answer.body.decode("utf-8")):
            self.cursor = cursor[0]
        return answer

    def told(self, answer: Answer) -> tuple[int, list[tuple[str, str]], str]:
        """The answer with a stable name for everything that is made up."""
        headers = [(name.decode(), self._named(value.decode("latin-1"))) for name, value in answer.headers]
        if answer.body and "content-length" in dict(headers):
            # A moment with fewer digits makes a body shorter.
            assert int(dict(headers)["content-length"]) == len(answer.body)
            headers = [header for header in headers if header[0] != "content-length"]
        return answer.status, headers, self._named(answer.body.decode("utf-8"))

    def _named(self, text: str) -> str:
        for pattern in (_MOMENT, _CURSOR, _UUID, _TAG):
            text = pattern.sub(
                lambda made: (
                    made[0] if made[0] in IDS else self.names.setdefault(made[0], f"<{len(self.names)}>")
                ),
                text,
            )
        return text


def token(user: UUID) -> bytes:
    return signing.SigningKeys(signing.seeds(KEY)).mint(user, None, 3600).encode()


def pick(chance: random.Random, number: int, side: Side, tokens: dict[str, bytes]) -> Asked:
    """A request out of everything that can be right or wrong with one; the same draws for each side."""
    verb = chance.choices(
        ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"], [6, 1, 5, 4, 4, 2, 1]
    )[0]
    one = chance.choice(IDS)
    path = chance.choice(PATHS).format(one=one, upper=one.upper(), bare=one.replace("-", ""))
    query = chance.choice(QUERIES).format(cursor=side.cursor)
    headers = [(b"host", b"test"), (b"x-request-id", b"r-%d" % number)]
    who = chance.choices(["ana", "bob", "none", "junk", "twice", "basic"], [30, 5, 1, 1, 1, 1])[0]
    known = (b"authorization", b"Bearer " + tokens[who if who in tokens else "ana"])
    headers += {
        "none": [], "junk": [(b"authorization", b"Bearer a.b.c")], "twice": [known, known],
        "basic": [(b"authorization", b"Basic YTpi")],
    }.get(who, [known])  # fmt: skip
    tag = side.tags.get(one, '"unknown"')
    for name, values in {
        b"if-match": ["*", tag, '"other"', f"W/{tag}", f'{tag}, "b"', "nonsense", ""],
        b"if-none-match": ["*", tag, f"W/{tag}", '"other"', "nonsense"],
        b"idempotency-key": ["k1", "k2", '"k1"', "", "a b", "k" * 300, f"n{number}"],
        b"accept": ["application/json", "text/html", "nonsense"],
        b"origin": ["https://app.example.com", "https://evil.example.com"],
        b"content-encoding": ["gzip", "identity"],
    }.items():
        if chance.random() < (0.15 if b"key" in name or b"if" in name else 0.02):
            headers.append((name, chance.choice(values).encode("latin-1")))
            if chance.random() < 0.05:
                headers.append(headers[-1])
    body = b""
    if verb in ("POST", "PATCH", "PUT") or chance.random() < 0.05:
        body = chance.choice(
            [b'{"title":"a"}', b'{"title":"b","description":"c","is_completed":true}', b'{"title":"a"}'] * 8
            + [
                b'{"is_completed":true}',
                b'{"description":null}',
                b"{}",
                b"",
                b"[]",
                b"null",
                b"{",
                b'{"title":""}',
            ]
            + [
                b'{"title":"a","title":"b"}',
                b'{"title":"a","id":"x"}',
                b'{"title":NaN}',
                b"\xff",
                b'{"title":7}',
            ]
            + [b'{"title":"%b"}' % (b"x" * 300), b'{"title":"%b"}' % (b"x" * 70_000)]
            + [json.dumps({"operations": [{"op": "create", "id": one, "task": {"title": "x"}}]}).encode()] * 2
        )
        headers.append(
            (b"content-type", chance.choices([b"application/json", b"application/json; charset=utf-8", b"text/plain",
                                              b"application/x-ndjson"], [12, 1, 1, 2])[0])
        )  # fmt: skip
    return Asked(verb, path.encode("ascii"), query.encode(), headers, body)


@pytest.fixture
async def both(database_url: str, second_database_url: str) -> AsyncIterator[tuple[Side, Side]]:
    apps = [
        create_app(
            load_settings(
                database_url=url, signing_keys=KEY, fast_path=fast, cors_origins="https://app.example.com"
            )
        )
        for url, fast in ((database_url, True), (second_database_url, False))
    ]
    async with apps[0].router.lifespan_context(apps[0]), apps[1].router.lifespan_context(apps[1]):
        yield Side(apps[0]), Side(apps[1])


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_fast_path_answers_byte_for_byte_as_fastapi_does(
    both: tuple[Side, Side], seed: int
) -> None:
    fast, slow = both
    tokens = {"ana": token(ANA), "bob": token(BOB)}
    seen: set[tuple[str, int]] = set()
    chances = random.Random(seed), random.Random(seed)
    for number in range(REQUESTS):
        asked = [
            pick(chance, number, side, tokens) for chance, side in zip(chances, (fast, slow), strict=True)
        ]
        quick = fast.told(await fast.answer(asked[0]))
        assert quick == slow.told(await slow.answer(asked[1])), asked
        seen.add((asked[0].verb, quick[0]))
    # What was compared was not one refusal over and over.
    assert {(verb, status) for verb in ("GET", "PATCH", "DELETE") for status in (401, 404)} <= seen
    assert {
        ("GET", 200), ("GET", 304), ("HEAD", 200), ("POST", 201), ("POST", 422), ("PATCH", 200),
        ("PATCH", 412), ("PUT", 200), ("PUT", 201), ("PUT", 412), ("DELETE", 204), ("POST", 415), ("POST", 413),
    } <= seen  # fmt: skip


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
@pytest.mark.parametrize("verb", ["GET", "HEAD", "POST"])
async def test_probes_are_answered_as_fastapi_does(both: tuple[Side, Side], verb: str, path: str) -> None:
    asked = Asked(verb, path.encode(), headers=[(b"x-request-id", b"r-1")])
    quick, slow = [side.told(await side.answer(asked)) for side in both]
    if path == "/health":
        # Its figures are of the moment, and so is its length.
        quick, slow = (
            (status, [header for header in headers if header[0] != "content-length"], "")
            for status, headers, _ in (quick, slow)
        )
    assert quick == slow


def test_every_operation_on_tasks_but_the_import_and_every_probe_takes_the_fast_path() -> None:
    declared = {route.name for route in tasks.router.routes}  # type: ignore[attr-defined]
    operations = create_app(Settings()).build_middleware_stack().fast_path.operations.keys()  # type: ignore[attr-defined]
    assert declared - operations == {"import_tasks"}
    assert operations - declared == {"livez", "readyz", "health"}


async def plain(request: Request) -> str:
    return "plain"


async def cleaned_up(request: Request) -> AsyncIterator[str]:
    yield "open"


def blocking(request: Request) -> str:
    return "blocking"


async def parsed(limit: Annotated[int, Query()] = 1) -> int:
    return limit


@pytest.mark.parametrize("needed", [cleaned_up, blocking, parsed])
def test_an_operation_that_needs_more_is_left_to_fastapi(needed: Any) -> None:
    router = APIRouter()

    @router.get("/a/{one:uuid}")
    async def taken(one: UUID, word: Annotated[str, Depends(plain)]) -> Response:
        return Response()

    @router.get("/b")
    async def left(word: Annotated[Any, Depends(needed)]) -> Response:
        return Response()

    @router.get("/c/{name}")
    async def named(name: str) -> Response:
        return Response()

    @router.get("/d")
    async def serialized() -> dict[str, str]:
        return {}

    @router.get("/e")
    async def by_name(*, word: Annotated[str, Depends(plain)]) -> Response:
        return Response()

    app = FastAPI()
    app.include_router(router)
    assert FastPath(app, [router]).operations.keys() == {"taken"}


async def test_each_dependency_is_asked_once_and_in_fastapis_order() -> None:
    asked: list[str] = []

    async def first(request: Request) -> str:
        asked.append("first")
        return "1"

    async def second(given: Annotated[str, Depends(first)]) -> str:
        asked.append("second")
        return given + "2"

    router = APIRouter()

    @router.get("/{one:uuid}/{two:uuid}")
    async def operation(
        two: UUID,
        late: Annotated[str, Depends(second)],
        early: Annotated[str, Depends(first)],
        request: Request,
        one: UUID,
    ) -> Response:
        return Response(f"{one} {two} {early} {late} {request.method}")

    app = FastAPI()
    app.include_router(router)
    request = Asked("GET", f"/{IDS[0]}/{IDS[1]}".encode())
    by_fastapi, order = (await Wire(app).ask(request)).body, list(asked)
    asked.clear()
    path = FastPath(app, [router])
    scope = {"type": "http", "method": "GET", "path": request.path.decode(), "headers": []}
    found = path.find(scope)
    assert found is not None
    assert (await path.answer(found, scope, None)).body == by_fastapi  # type: ignore[arg-type]
    assert asked == order == ["first", "second"]


async def test_what_a_router_is_included_with_counts() -> None:
    asked: list[str] = []

    async def guard(request: Request) -> None:
        asked.append(request.url.path)

    router = APIRouter()

    @router.get("/{one:uuid}")
    async def operation(one: UUID) -> Response:
        return Response(str(one))

    app = FastAPI()
    app.include_router(router, prefix="/below", dependencies=[Depends(guard)])
    path = FastPath(app, [router])
    scope = {"type": "http", "method": "GET", "headers": [], "path": f"/{IDS[0]}"}
    assert path.find(scope) is None
    scope["path"] = f"/below/{IDS[0]}"
    found = path.find(scope)
    assert found is not None
    assert (await path.answer(found, scope, None)).body == IDS[0].encode()  # type: ignore[arg-type]
    assert asked == [scope["path"]]
    assert route_of(scope) == "/below/{one}"


def test_what_a_test_overrides_is_left_to_fastapi() -> None:
    app = create_app(Settings())
    path = FastPath(app, [tasks.router])
    scope = {"method": "GET", "path": "/v1/tasks"}
    assert path.find(scope) is not None
    assert path.find({**scope, "root_path": "/below"}) is None
    app.dependency_overrides[plain] = plain
    assert path.find(scope) is None
