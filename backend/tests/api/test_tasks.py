"""Tasks over HTTP: what each operation answers, and that nobody learns of anybody else's."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from clusters import Proxy
from src.models import TaskRead

if TYPE_CHECKING:
    from postgres_server import PostgresServer
    from tests.api.conftest import MakeApp, Person, Serve

TASKS = "/v1/tasks"
ID = "019ac0de-7a10-7c55-8a1c-0d6f3b9e4a21"


def slug(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).removeprefix("/problems/")


async def test_a_task_is_made_read_changed_replaced_and_deleted(ana: Person) -> None:
    made = await ana.ask("POST", TASKS, json={"title": "a", "description": "b"})
    task = made.json()
    TaskRead.model_validate(task)
    path = made.headers["location"]
    assert (made.status_code, path) == (201, f"{TASKS}/{task['id']}")
    assert (task["user_id"], task["version"], task["is_completed"]) == (str(ana.id), 1, False)

    read = await ana.ask("GET", path)
    assert (read.status_code, read.content, read.headers["etag"]) == (200, made.content, made.headers["etag"])

    changed = await ana.ask("PATCH", path, json={"is_completed": True})
    assert changed.json() == {
        **task, "is_completed": True, "version": 2, "updated_at": changed.json()["updated_at"],
    }  # fmt: skip
    cleared = await ana.ask("PATCH", path, json={"description": None})
    assert (cleared.json()["description"], cleared.json()["version"]) == (None, 3)

    replaced = await ana.ask("PUT", path, json={"title": "c"})
    assert replaced.status_code == 200
    assert (replaced.json()["title"], replaced.json()["is_completed"]) == ("c", False)
    assert "location" not in replaced.headers

    gone = await ana.ask("DELETE", path)
    assert (gone.status_code, gone.content) == (204, b"")
    for method, more in (("GET", {}), ("PATCH", {"json": {}}), ("DELETE", {})):
        answer = await ana.ask(method, path, **more)
        assert (answer.status_code, slug(answer)) == (404, "not-found")
    tags = [answer.headers["etag"] for answer in (made, changed, cleared, replaced)]
    assert len(set(tags)) == 4
    assert all(re.fullmatch(r'"[!#-~]+"', tag) for tag in tags)


async def test_a_put_makes_a_task_under_the_clients_own_id(ana: Person) -> None:
    id_ = uuid4()
    made = await ana.ask("PUT", f"{TASKS}/{id_}", json={"title": "a", "is_completed": True})
    assert (made.status_code, made.headers["location"]) == (201, f"{TASKS}/{id_}")
    assert made.json()["id"] == str(id_)
    again = await ana.ask("PUT", f"{TASKS}/{id_.hex.upper()}", json={"title": "b"})
    assert (again.status_code, again.json()["version"]) == (200, 2)
    assert len((await ana.ask("GET", TASKS)).json()["items"]) == 1


async def test_somebody_elses_task_is_one_that_does_not_exist(ana: Person, ben: Person) -> None:
    theirs = await ben.create("secret")
    nobodys = str(uuid4())
    for method, more in (
        ("GET", {}),
        ("HEAD", {}),
        ("PATCH", {"json": {"title": "mine"}}),
        ("PATCH", {"json": {}}),
        ("DELETE", {}),
    ):
        answers = [
            await ana.ask(method, f"{TASKS}/{id_}", headers={"x-request-id": "same"}, **more)
            for id_ in (theirs["id"], nobodys)
        ]
        assert answers[0].status_code == 404
        assert answers[0].content == answers[1].content
        assert answers[0].headers == answers[1].headers
    put = await ana.ask("PUT", f"{TASKS}/{theirs['id']}", json={"title": "mine"})
    assert (put.status_code, put.json()["user_id"]) == (201, str(ana.id))
    assert (await ben.ask("GET", f"{TASKS}/{theirs['id']}")).json() == theirs
    assert [task["title"] for task in (await ana.ask("GET", TASKS)).json()["items"]] == ["mine"]


async def test_before_the_first_write_there_is_nothing(ana: Person) -> None:
    answer = await ana.ask("GET", f"{TASKS}?count=exact")
    assert answer.json() == {"items": [], "next_cursor": None, "count": 0}
    assert (await ana.ask("GET", f"{TASKS}/{uuid4()}")).status_code == 404


@pytest.mark.parametrize("path", ["x", "1", "batchx", ID[:-1], "%00", "..%2f", f"{ID}/x"])
async def test_a_path_without_an_id_is_404(ana: Person, path: str) -> None:
    for method in ("GET", "PATCH", "DELETE", "PUT"):
        answer = await ana.ask(method, f"{TASKS}/{path}")
        assert (answer.status_code, slug(answer)) == (404, "not-found")


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("", "GET, HEAD, POST"),
        ("/batch", "POST"),
        ("/export", "GET, HEAD"),
        ("/import", "POST"),
        ("/00000000-0000-4000-8000-000000000000", "DELETE, GET, HEAD, PATCH, PUT"),
    ],
)
async def test_methods_that_are_not_answered_are_405_and_the_others_are_named(
    client: httpx.AsyncClient, path: str, allow: str
) -> None:
    for method in ("OPTIONS", "TRACE", "CONNECT", "BREW", "PATCH", "PUT", "DELETE", "POST", "GET"):
        if method not in allow:
            answer = await client.request(method, TASKS + path)
            assert (answer.status_code, slug(answer)) == (405, "method-not-allowed")
            assert answer.headers["allow"] == allow


async def test_every_answer_says_how_it_may_be_kept_and_gives_no_address_away(ana: Person) -> None:
    task = await ana.create()
    path = f"{TASKS}/{task['id']}"
    kept = {
        ("GET", path): "private, no-cache",
        ("HEAD", path): "private, no-cache",
        ("GET", TASKS): "no-store",
        ("PATCH", path): "no-store",
        ("GET", f"{TASKS}/export"): "no-store",
        ("GET", f"{TASKS}/{uuid4()}"): "no-store",
        ("POST", TASKS): "no-store",
        ("DELETE", path): "no-store",
    }
    for (method, where), cache in kept.items():
        answer = await ana.ask(
            method, where, **({"json": {"title": "b"}} if method in ("PATCH", "POST") else {})
        )
        assert answer.headers["cache-control"] == cache, (method, where)
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get("vary") == ("authorization" if "private" in cache else None)


async def test_below_a_prefix_the_places_named_are_below_it_too(
    make_app: MakeApp, somebody: type[Person]
) -> None:
    app = make_app()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, root_path="/api")
        async with httpx.AsyncClient(transport=transport, base_url="http://test/api") as client:
            ana = somebody(client)
            for _ in range(2):
                made = await ana.ask("POST", "/v1/tasks", json={"title": "a"})
            assert made.headers["location"].startswith("/api/v1/tasks/")
            listed = await ana.ask("GET", "/v1/tasks?limit=1")
            assert listed.links["next"]["url"].startswith("/api/v1/tasks?")
            large = await ana.ask("POST", "/v1/tasks/batch", content=b" " * 70_000)
            assert large.status_code == 415


# Lists


async def titles(person: Person, query: str = "") -> list[str]:
    answer = await person.ask("GET", f"{TASKS}?{query}")
    assert answer.status_code == 200, answer.text
    return [task["title"] for task in answer.json()["items"]]


async def test_lists_are_filtered_sorted_searched_and_counted(ana: Person, ben: Person) -> None:
    await ben.create("a of ben's")
    tasks = [await ana.create(title, is_completed=title in "bd") for title in "abcd"]
    await ana.ask("PATCH", f"{TASKS}/{tasks[0]['id']}", json={"description": "changed 100%"})
    assert await titles(ana) == ["d", "c", "b", "a"]
    assert await titles(ana, "order=asc") == ["a", "b", "c", "d"]
    assert await titles(ana, "sort=updated_at") == ["a", "d", "c", "b"]
    assert await titles(ana, "sort=updated_at&order=asc&limit=2") == ["b", "c"]
    assert await titles(ana, "is_completed=true") == ["d", "b"]
    assert await titles(ana, "is_completed=false&sort=updated_at") == ["a", "c"]
    assert await titles(ana, f"created_after={tasks[1]['created_at']}") == ["d", "c"]
    assert await titles(ana, f"created_before={tasks[1]['created_at']}") == ["a"]
    assert await titles(ana, f"updated_after={tasks[3]['updated_at']}") == ["a"]
    assert await titles(
        ana, f"updated_before={tasks[2]['updated_at']}&created_after={tasks[0]['created_at']}"
    ) == ["b"]
    east = (datetime.fromisoformat(tasks[1]["created_at"]).astimezone(UTC) + timedelta(hours=5)).isoformat()
    east = east.replace("+00:00", "%2B05:00")
    assert await titles(ana, f"created_after={east}") == ["d", "c"]
    assert await titles(ana, "q=CHANGED") == ["a"]
    assert await titles(ana, "q=100%25") == ["a"]
    assert await titles(ana, "q=_") == []
    for count in ("exact", "estimated"):
        answer = (await ana.ask("GET", f"{TASKS}?limit=1&is_completed=true&count={count}")).json()
        assert (len(answer["items"]), answer["count"]) == (1, 2)
    assert (await ana.ask("GET", TASKS)).json()["count"] is None


async def test_following_the_link_visits_every_task_once_and_keeps_the_question(ana: Person) -> None:
    for number in range(7):
        await ana.create(f"{number} ä&=", is_completed=number != 3)
    url, seen = (
        f"{TASKS}?limit=2&is_completed=true&q=%C3%A4%26%3D&order=asc&created_after=2020-01-01T00:00:00Z",
        [],
    )
    pages = []
    while url:
        answer = await ana.ask("GET", url)
        body = answer.json()
        seen += [task["title"][0] for task in body["items"]]
        pages.append(len(body["items"]))
        url = answer.links.get("next", {}).get("url", "")
        assert (body["next_cursor"] is None) == (url == "")
        if url:
            given = dict(httpx.URL(url).params)
            assert given == {
                "limit": "2", "is_completed": "true", "q": "ä&=", "order": "asc",
                "created_after": "2020-01-01T00:00:00.000000Z", "cursor": body["next_cursor"],
            }  # fmt: skip
    assert (seen, pages) == (list("012456"), [2, 2, 2])


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=201", "limit"),
        ("limit=9223372036854775808", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("limit=1.0", "limit"),
        ("limit=1_0", "limit"),
        ("limit=", "limit"),
        ("limit=%2B5", "limit"),
        ("limit=٣", "limit"),
        ("is_completed=1", "is_completed"),
        ("is_completed=True", "is_completed"),
        ("is_completed=", "is_completed"),
        ("created_after=2026", "created_after"),
        ("created_after=1700000000", "created_after"),
        ("created_after=2026-01-01T00:00:00", "created_after"),
        ("created_after=2026-01-01T00:00:00+01:00", "created_after"),
        ("created_before=0001-01-01T00:00:00%2B23:59", "created_before"),
        ("updated_after=infinity", "updated_after"),
        ("updated_before=2026-02-30T00:00:00Z", "updated_before"),
        ("q=", "q"),
        ("q=%00", "q"),
        ("q=%FF", "q"),
        ("q=%ED%A0%80", "q"),
        ("limit=%FF", "limit"),
        ("is_completed=%FF", "is_completed"),
        ("sort=%FF", "sort"),
        ("%FF=1", ""),
        ("q=" + "a" * 256, "q"),
        ("sort=title", "sort"),
        ("order=up", "order"),
        ("count=all", "count"),
        ("page=2", ""),
        ("limit=1&limit=2", ""),
        ("LIMIT=1", ""),
    ],
)
async def test_a_bad_parameter_is_422_and_named(ana: Person, query: str, name: str) -> None:
    answer = await ana.ask("GET", f"{TASKS}?{query}")
    assert (answer.status_code, slug(answer)) == (422, "invalid")
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [name]


async def test_the_edges_of_what_may_be_asked_are_answered(ana: Person) -> None:
    await ana.create()
    for query in (
        "limit=1", "limit=200", "created_after=0001-01-01T00:00:00Z", "created_before=9999-12-31T23:59:59.999999Z",
        "updated_before=9999-12-31T23:59:59.9999999%2B00:00", "q=" + "%F0%9F%92%A9" * 255, "q=%25%5C_",
    ):  # fmt: skip
        assert (await ana.ask("GET", f"{TASKS}?{query}")).status_code == 200, query


# Writes that are sent again


async def test_a_hundred_duplicates_at_once_make_one_task_and_give_one_answer(ana: Person) -> None:
    headers = {"idempotency-key": "k"}
    answers = await asyncio.gather(
        *(ana.ask("POST", TASKS, json={"title": "a"}, headers=headers) for _ in range(100))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert len((await ana.ask("GET", TASKS)).json()["items"]) == 1


async def test_a_key_belongs_to_one_request_of_one_person(ana: Person, ben: Person) -> None:
    headers = {"idempotency-key": "k"}
    first = await ana.ask("POST", TASKS, json={"title": "a"}, headers=headers)
    other = await ana.ask("POST", TASKS, json={"title": "b"}, headers=headers)
    assert (other.status_code, slug(other)) == (422, "idempotency-key-reused")
    batch = {"operations": [{"op": "create", "task": {"title": "a"}}]}
    other = await ana.ask("POST", f"{TASKS}/batch", json=batch, headers=headers)
    assert (other.status_code, slug(other)) == (422, "idempotency-key-reused")
    theirs = await ben.ask("POST", TASKS, json={"title": "b"}, headers=headers)
    assert (theirs.status_code, "idempotency-replayed" in theirs.headers) == (201, False)
    assert first.json()["id"] != theirs.json()["id"]
    assert await titles(ana) == ["a"]


async def test_a_lost_answer_is_504_and_only_a_key_makes_the_repeat_safe(
    make_app: MakeApp, serve: Serve, somebody: type[Person], postgres: PostgresServer, database_url: str
) -> None:
    batch = {"operations": [{"op": "create", "task": {"title": "b"}}]}
    with Proxy(postgres.port) as proxy:
        app = make_app(database_url=proxy.through(database_url), database_command_timeout_seconds=1)
        async with serve(app) as client:
            ana = somebody(client)
            path = f"{TASKS}/{(await ana.create('first'))['id']}"
            for method, where, body in (
                ("POST", TASKS, {"title": "a"}),
                ("POST", f"{TASKS}/batch", batch),
                ("PATCH", path, {"is_completed": True}),
                ("PUT", path, {"title": "c"}),
            ):
                for keyed in (False, True) if method == "POST" else (False,):
                    headers = {"idempotency-key": f"{where} key"[-5:].replace(" ", "-")} if keyed else {}
                    proxy.drop_replies()
                    lost = await ana.ask(method, where, json=body, headers=headers)
                    proxy.heal()
                    if lost.status_code == 503:
                        # Dropped before the write was sent: BEGIN, or a new connection.
                        assert lost.headers["retry-after"].isdigit()
                        continue
                    assert (lost.status_code, slug(lost)) == (504, "outcome-unknown")
                    assert ("retry-after" in lost.headers) == keyed
                    if keyed:
                        again = await ana.ask(method, where, json=body, headers=headers)
                        while again.status_code == 503:  # It has not been reached again yet.
                            again = await ana.ask(method, where, json=body, headers=headers)
                        assert again.status_code in (200, 201)
                        assert again.headers["idempotency-replayed"] == "true"
            proxy.drop_replies()
            read = await ana.ask("GET", path)
            assert (read.status_code, "retry-after" in read.headers) == (503, True)


# The document


async def test_the_document_names_every_operation_with_its_body_its_links_and_its_lock(
    client: httpx.AsyncClient,
) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    bodies = {
        "create_task": "TaskCreate", "update_task": "TaskUpdate", "replace_task": "TaskPut", "batch_tasks": "TaskBatch",
        "sign_up": "SignUp", "update_me": "AccountChange", "log_in": "LogIn",
        "refresh": "Refresh", "log_out": "Refresh",
    }  # fmt: skip
    unlocked = {"sign_up", "log_in", "refresh", "log_out"}
    seen = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            seen[operation["operationId"]] = operation
            if path.startswith("/v1/") and operation["operationId"] not in unlocked:
                assert operation["security"] == [{"bearer": []}]
                assert {"401", "503"} <= set(operation["responses"])
            else:
                assert operation["security"] == []
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body:
                assert method in ("post", "put", "patch")
                assert body["schema"] == {"$ref": f"#/components/schemas/{bodies[operation['operationId']]}"}
                assert {"400", "413", "415", "422"} <= set(operation["responses"])
            for answer in operation["responses"].values():
                for link in answer.get("links", {}).values():
                    assert link["operationId"] in ("read_task", "update_task", "replace_task", "delete_task")
    assert {
        "list_tasks", "create_task", "read_task", "update_task", "replace_task", "delete_task", "batch_tasks",
        "export_tasks", "import_tasks",
    } <= set(seen)  # fmt: skip
    for name in ("create_task", "replace_task"):
        assert set(seen[name]["responses"]["201"]["links"]) == {
            "read_task", "update_task", "replace_task", "delete_task",
        }  # fmt: skip
    assert schemas["TaskCreate"]["additionalProperties"] is False
    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used <= set(schemas)


async def test_every_example_of_the_document_is_taken_or_given_by_the_service(
    client: httpx.AsyncClient, somebody: type[Person]
) -> None:
    document = (await client.get("/openapi.json")).json()
    tried = 0
    for path, item in document["paths"].items():
        for method, operation in item.items():
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                for example in content["examples"].values():
                    ana = somebody(client)
                    sent = (
                        example["value"]
                        if isinstance(example["value"], str)
                        else json.dumps(example["value"])
                    )
                    if operation["operationId"] == "batch_tasks":
                        await prepared(ana, example["value"])
                        sent = re.sub(r', "if_match": "[^"]*"', "", sent)
                    where = path.replace("{task_id}", (await ana.create())["id"])
                    answer = await ana.ask(method, where, content=sent, headers={"content-type": media_type})
                    # A password, and a token, that nobody has are taken as what they are.
                    refused = {"update_me": (403,), "refresh": (401,), "log_out": (204,)}
                    wanted = refused.get(operation["operationId"], (200, 201))
                    assert answer.status_code in wanted, (method, path, answer.text)
                    tried += 1
    assert tried >= 8
    example = document["paths"]["/v1/tasks"]["post"]["responses"]["201"]["content"]["application/json"][
        "examples"
    ]
    TaskRead.model_validate(example["example"]["value"])


async def prepared(person: Person, batch: dict[str, Any]) -> None:
    """Makes the tasks that the operations name."""
    for operation in batch["operations"]:
        if operation["op"] != "create":
            await person.ask("PUT", f"{TASKS}/{UUID(operation['id'])}", json={"title": "there"})


@pytest.mark.parametrize("fast_path", ["true", "false"])
async def test_a_list_of_large_tasks_is_walked_in_pages_of_a_mebibyte(
    make_app: MakeApp, serve: Serve, somebody: type[Person], database_url: str, fast_path: str
) -> None:
    async with serve(make_app(fast_path=fast_path)) as client:
        person = somebody(client)
        await person.create("first")
        connection = await asyncpg.connect(database_url)
        await connection.execute(
            "INSERT INTO tasks (user_id, title, description)"
            " SELECT $1, i::text, repeat('\U0001f600', 10000) FROM generate_series(1, 99) i",
            person.id,
        )
        await connection.close()
        query, titles, pages = "limit=200&count=exact", [], 0
        while True:
            answer = await person.ask("GET", f"/v1/tasks?{query}")
            assert answer.status_code == 200
            assert len(answer.content) < (1 << 20) + 300
            page = answer.json()
            titles += [task["title"] for task in page["items"]]
            pages += 1
            assert page["count"] == 100
            assert ("next" in answer.links) == (page["next_cursor"] is not None)
            if page["next_cursor"] is None:
                break
            query = f"limit=200&count=exact&cursor={page['next_cursor']}"
        assert sorted(titles) == sorted(["first", *map(str, range(1, 100))])
        assert pages == 4
