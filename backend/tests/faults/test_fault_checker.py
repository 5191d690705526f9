"""Each thing that must not be is found in a history that was made to have it, and a good history has none of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checker import COLUMNS, Findings, Row, check
from tests.faults.contract import PROBLEM, breaches, content_of, strange
from tests.faults.history import History, read
from tests.faults.journal import Clock, Journal
from tests.faults.wire import Answer

ANA, BEN = "ana", "ben"


class Story:
    """Attempts one after the other, each a tenth of a second long; then the rows and keys that are left."""

    def __init__(self) -> None:
        self.journals: dict[str, list[dict[str, Any]]] = {}
        self.now = 0.0
        self.rows: dict[tuple[str, str], Row] = {}
        self.keys: dict[tuple[str, str], str | None] = {}

    def tell(
        self, do: str, outcome: str, status: int, *, client: str = "c0", user: str = ANA, **facts: Any
    ) -> None:
        """What of `facts` was asked and what was told goes by its name."""
        asked = {
            name: facts[name] for name in ("mark", "key", "base", "if", "known", "owner") if name in facts
        }
        if do != "create" and do != "list":
            asked["task"] = facts["task"]
        told = {
            name: facts[name]
            for name in ("mark", "version", "etag", "tasks", "whole", "wrong")
            if name in facts
        }
        if "shown" in facts:
            told["mark"] = facts["shown"]
        if outcome == "ok" and do not in ("delete", "list"):
            told["task"] = facts["task"]
        journal = self.journals.setdefault(client, [])
        number = len(journal)
        journal.append({"at": self.now, "n": number, "e": "invoke", "do": do, "user": user, **asked})
        journal.append({"at": self.now + 0.1, "n": number, "e": outcome, "status": status, **told})
        self.now += 0.2

    def row(self, task: str, title: str, version: int, *, user: str = ANA, whole: bool = True) -> None:
        self.rows[user, task] = Row(user, task, title, version, whole)

    @property
    def found(self) -> Findings:
        past, findings = History(), Findings()
        for name, journal in self.journals.items():
            read(name, journal, past)
        check(past, self.rows.values(), self.keys, findings)
        return findings


def good() -> Story:
    """A task that is made, changed, read, listed and left; another that is deleted; one that stayed unknown."""
    story = Story()
    story.tell("create", "unknown", 0, mark="m1", key="k1")
    story.tell("create", "ok", 201, mark="m1", key="k1", task="t1", version=1, etag="e1")
    story.tell("patch", "ok", 200, mark="m2", task="t1", base=1, version=2, etag="e2", **{"if": "e1"})
    story.tell("patch", "fail", 412, mark="m3", task="t1", base=1, client="c1", **{"if": "e1"})
    story.tell("patch", "unknown", 504, mark="m4", task="t1")
    story.tell("read", "ok", 200, task="t1", mark="m4", shown="m4", version=3)
    story.tell("create", "ok", 201, mark="m5", task="t2", version=1, etag="e5")
    story.tell("delete", "ok", 204, mark="m6", task="t2")
    story.tell("read", "fail", 404, task="t2")
    story.tell("create", "fail", 503, mark="m7")
    story.tell("create", "unknown", 0, mark="m8")
    story.tell("list", "ok", 200, tasks=[["t1", "m4", 3]], whole=True)
    story.tell("foreign", "fail", 404, user=BEN, mark="m9", task="t1", owner=ANA)
    story.row("t1", "m4", 3)
    story.keys[ANA, "k1"] = "t1"
    return story


def test_a_good_history_has_nothing_forbidden() -> None:
    found = good().found
    assert found.clean, found.examples
    unknown_and_stored = good()
    unknown_and_stored.row("t8", "m8", 1)
    assert unknown_and_stored.found.clean


def lose(story: Story) -> None:
    del story.rows[ANA, "t1"]


def lose_the_last_change(story: Story) -> None:
    story.row("t1", "m1", 1)


def overwrite(story: Story) -> None:
    story.row("t1", "m2", 3)


def spoil(story: Story) -> None:
    story.row("t1", "m4", 3, whole=False)


def lose_the_key(story: Story) -> None:
    story.keys.clear()


def hide(story: Story) -> None:
    story.tell("read", "fail", 404, task="t1")


def double(story: Story) -> None:
    story.row("t9", "m4", 1)


def make_again(story: Story) -> None:
    story.tell("replay", "ok", 201, mark="m1", key="k1", task="t9", version=1, etag="e1")


def change_twice(story: Story) -> None:
    story.tell("patch", "ok", 200, mark="m10", task="t1", version=5, etag="e10")
    story.row("t1", "m10", 5)


def take_the_key_for_another(story: Story) -> None:
    story.tell("reuse", "ok", 201, mark="m10", key="k1", task="t1", version=1)


def invent(story: Story) -> None:
    story.row("t9", "nobody's", 1)


def store_what_was_refused(story: Story) -> None:
    story.row("t7", "m7", 1)


def show_what_was_refused(story: Story) -> None:
    story.tell("read", "ok", 200, task="t7", mark="m7", shown="m7", version=1)


def keep_the_key_of_what_was_refused(story: Story) -> None:
    story.tell("create", "fail", 503, mark="m10", key="k10")
    story.keys[ANA, "k10"] = "t10"


def resurrect(story: Story) -> None:
    story.row("t2", "m5", 1)


def show_what_was_deleted(story: Story) -> None:
    story.tell("read", "ok", 200, task="t2", mark="m5", shown="m5", version=1)


def let_both_win(story: Story) -> None:
    for mark in ("m10", "m11"):
        story.tell("patch", "ok", 200, mark=mark, task="t1", base=3, version=4, etag=mark, **{"if": "e4"})
    story.row("t1", "m11", 4)


def skip_a_version(story: Story) -> None:
    story.tell("patch", "ok", 200, mark="m10", task="t1", base=2, version=4, etag="e10", **{"if": "e2"})
    story.row("t1", "m10", 4)


def go_back(story: Story) -> None:
    story.tell("read", "ok", 200, task="t1", mark="m2", shown="m2", version=2)


def show_another_client_what_is_old(story: Story) -> None:
    story.tell("read", "ok", 200, client="c1", task="t1", mark="m2", shown="m2", version=2)


def leave_out_of_a_list(story: Story) -> None:
    story.tell("list", "ok", 200, tasks=[], whole=True)


def refuse_a_good_condition(story: Story) -> None:
    story.tell("patch", "fail", 412, mark="m10", task="t1", base=3, **{"if": "e4"})


def store_what_a_stranger_wrote(story: Story) -> None:
    story.row("t1", "m9", 3)


def let_a_stranger_in(story: Story) -> None:
    story.tell("foreign-read", "ok", 200, user=BEN, mark="m10", task="t1", owner=ANA, version=3)


def answer_wrongly(story: Story) -> None:
    story.tell("create", "unknown", 500, mark="m10", wrong=["status-500-on-create"])


@pytest.mark.parametrize(
    ("column", "spoil_it"),
    [
        ("lost", lose),
        ("lost", lose_the_last_change),
        ("lost", overwrite),
        ("lost", spoil),
        ("lost", lose_the_key),
        ("lost", hide),
        ("doubled", double),
        ("doubled", make_again),
        ("doubled", change_twice),
        ("doubled", take_the_key_for_another),
        ("phantom", invent),
        ("lie", store_what_was_refused),
        ("lie", show_what_was_refused),
        ("lie", keep_the_key_of_what_was_refused),
        ("undead", resurrect),
        ("undead", show_what_was_deleted),
        ("lost-update", let_both_win),
        ("lost-update", skip_a_version),
        ("backwards", go_back),
        ("stale", show_another_client_what_is_old),
        ("stale", leave_out_of_a_list),
        ("contract", refuse_a_good_condition),
        ("contract", answer_wrongly),
        ("isolation", store_what_a_stranger_wrote),
        ("isolation", let_a_stranger_in),
    ],
)
def test_a_bad_history_is_found(column: str, spoil_it: Callable[[Story], None]) -> None:
    story = good()
    spoil_it(story)
    assert column in COLUMNS
    assert story.found.counts[column], story.found.examples


def answered(status: int, body: Any = None, **headers: str) -> Answer:
    given = {"x-request-id": "r1", "x-content-type-options": "nosniff"}
    if status >= 400:
        given["content-type"] = PROBLEM
        body = {"type": "/problems/x", "title": "X", "status": status, "request_id": "r1"} | (body or {})
    return Answer(
        status,
        given | {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps(body).encode(),
    )


def test_answers_are_held_to_the_contract() -> None:
    fine = (
        ("create", answered(201, {}, content_type="application/json"), False),
        ("create", answered(503, retry_after="1"), False),
        ("create", answered(504, retry_after="1"), True),
        ("create", answered(504), False),
        ("delete", answered(204), False),
        ("foreign", answered(404), False),
    )
    assert [breaches(do, answer, "r1", keyed=keyed) for do, answer, keyed in fine] == [[]] * len(fine)
    broken = (
        ("create", answered(500), False),
        ("create", answered(503), False),
        ("create", answered(504, retry_after="1"), False),
        ("create", answered(504), True),
        ("read", answered(504), False),
        ("read", answered(404, {"request_id": "r2"}), False),
        ("read", answered(404, content_type="text/plain"), False),
        ("delete", answered(204, x_request_id="r2"), False),
        ("foreign", answered(200, {}, content_type="application/json"), False),
    )
    assert [answer for do, answer, keyed in broken if not breaches(do, answer, "r1", keyed=keyed)] == []


def test_a_task_is_known_by_its_mark() -> None:
    task = {"id": "t1", "user_id": ANA, "version": 1, **content_of("m1")}
    assert strange(task, ANA, "t1") == []
    assert strange(task, BEN) == ["row-of-another-person"]
    assert strange(task, ANA, "t2") == ["another-task"]
    assert strange(task | {"description": "else"}, ANA) == ["content-untrue"]


def test_a_journal_is_appended_to_and_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "c0.jsonl", Clock())
    number = journal.invoke(do="create", user=ANA, mark="m1")
    journal.end(number, "ok", status=201, task="t1", mark="m1", version=1, etag="e1")
    journal.close()
    past = History()
    read("c0", map(json.loads, journal.path.read_text().splitlines()), past)
    assert past.intentions["m1"].version == 1
    assert not past.intentions["m1"].failed


def test_an_attempt_without_an_end_is_unknown() -> None:
    past = History()
    read("c0", [{"at": 0.0, "n": 1, "e": "invoke", "do": "create", "user": ANA, "mark": "m1"}], past)
    assert past.intentions["m1"].unknown


def test_breakages_are_known_to_their_mutants() -> None:
    from tests.faults import breakages
    from tests.faults.mutants import MUTANTS

    assert {mutant.breakage for mutant in MUTANTS.values()} == set(breakages.BREAKAGES)
    assert all(
        mutant.caught_by <= COLUMNS.keys() and (mutant.caught_by or mutant.control)
        for mutant in MUTANTS.values()
    )
    assert sum(not mutant.control for mutant in MUTANTS.values()) >= 12
    assert asyncio.iscoroutinefunction(breakages.tasks.create)
