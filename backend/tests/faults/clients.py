"""Clients: each does what people do, one thing after the other, and believes only what it was told.

Two clients are a family: beside users of their own they share one, and write to the same tasks as rivals. What was
answered 503 is sent again half of the time, and given up the other half: a row of something that was given up is a lie
found out. What stayed unknown under an Idempotency-Key is kept in `open_keys`, to be settled at the end.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from src.services.signing import SigningKeys

from .asker import TASKS, Asker, Outcome, Person
from .contract import content_of

_MOST_TASKS: Final = 120
_SHARED_TASKS: Final = 12
_WEIGHTS: Final = {
    "create": 40,
    "create_plain": 10,
    "place": 5,
    "patch": 14,
    "patch_plain": 5,
    "replace": 3,
    "rival": 8,
    "delete": 8,
    "read": 5,
    "list_all": 1,
    "foreign": 3,
    "replay": 2,
    "reuse": 1,
    "batch": 1,
}


@dataclass
class Town:
    """What clients know of each other: ids to try, and whose they are."""

    tasks: deque[tuple[str, str, str]] = field(default_factory=lambda: deque(maxlen=400))


@dataclass
class Family:
    """One user with two clients, and the tasks that both write to."""

    person: Person
    tasks: list[str] = field(default_factory=list)


@dataclass
class Keyed:
    """A request that may be sent again: with its key, and the mark of what it means."""

    do: str
    person: Person
    path: str
    body: Any
    key: str
    mark: str


class Client:
    """Runs until `stop` is set; `settle` then repeats what is open."""

    def __init__(
        self, asker: Asker, family: Family, town: Town, keys: SigningKeys, chance: random.Random
    ) -> None:
        self.asker = asker
        self.family = family
        self.town = town
        self.keys = keys
        self.chance = chance
        self.person = Person(keys)
        self.open_keys: list[Keyed] = []
        self.last_keyed: Keyed | None = None
        self._names = list(_WEIGHTS)
        self._weights = list(_WEIGHTS.values())

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            [name] = self.chance.choices(self._names, self._weights)
            await getattr(self, f"_{name}")()
            if len(self.person.tasks) >= _MOST_TASKS:
                self.person = Person(self.keys)

    async def settle(self, seconds: float) -> int:
        """Repeats what stayed unknown under a key until it is known; gives how many could not be settled."""
        until = asyncio.get_running_loop().time() + seconds
        while self.open_keys and asyncio.get_running_loop().time() < until:
            keyed, *self.open_keys = self.open_keys
            if not (await self._send(keyed)).ok:
                self.open_keys.append(keyed)
                await asyncio.sleep(0.05)
        return len(self.open_keys)

    def close(self) -> None:
        self.asker.close()

    # Writing what is new

    async def _create(self) -> None:
        mark = self.asker.new_mark()
        keyed = Keyed("create", self.person, TASKS, content_of(mark), self.person.next_key(), mark)
        done = await self._insist(keyed)
        if done.ok:
            self._own(keyed.person, done)
            self.last_keyed = keyed

    async def _batch(self) -> None:
        mark, person = self.asker.new_mark(), self.person
        parts = [f"{mark}/{number}" for number in range(3)]
        operations = [{"op": "create", "id": str(uuid4()), "task": content_of(part)} for part in parts]
        keyed = Keyed("batch", person, f"{TASKS}/batch", {"operations": operations}, person.next_key(), mark)
        done = await self._insist(keyed)
        if done.ok:
            for result in done.task["results"]:
                person.tasks[result["id"]] = (result["etag"], result["task"]["version"])

    async def _insist(self, keyed: Keyed) -> Outcome:
        unknown = False
        for _ in range(4):
            done = await self._send(keyed)
            if done.ok:
                return done
            unknown = unknown or done.kind == "unknown"
            await self._breathe()
            if not unknown and self.chance.random() < 0.5:
                return done
        if unknown:
            self.open_keys.append(keyed)
        return done

    async def _send(self, keyed: Keyed) -> Outcome:
        return await self.asker.attempt(
            keyed.do, keyed.person, "POST", keyed.path, body=keyed.body, key=keyed.key, mark=keyed.mark,
            hang_up_after=self._impatience(),
        )  # fmt: skip

    async def _create_plain(self) -> None:
        mark, person = self.asker.new_mark(), self.person
        for _ in range(3):
            done = await self.asker.attempt(
                "create", person, "POST", body=content_of(mark), mark=mark, hang_up_after=self._impatience()
            )
            if done.ok:
                self._own(person, done)
            if done.kind != "fail":
                return
            await self._breathe()
            if self.chance.random() < 0.5:
                return

    async def _place(self) -> None:
        mark, person, task = self.asker.new_mark(), self.person, str(uuid4())
        for _ in range(3):
            done = await self.asker.attempt(
                "place", person, "PUT", f"{TASKS}/{task}", body=content_of(mark), mark=mark, task=task,
                headers="if-none-match: *\r\n",
            )  # fmt: skip
            if done.ok:
                self._own(person, done)
                return
            if done.status == 412:
                await self._look(person, task)
                return
            await self._breathe()

    # Writing to what is there

    async def _patch(self, *, conditional: bool = True, method: str = "PATCH", do: str = "patch") -> None:
        found = self._any_task()
        if found is None:
            return
        task, (etag, version) = found
        person = self.person
        await self._write(do, person, method, task, etag if conditional else None, version)

    async def _patch_plain(self) -> None:
        await self._patch(conditional=False)

    async def _replace(self) -> None:
        await self._patch(method="PUT", do="replace")

    async def _rival(self) -> None:
        family = self.family
        if len(family.tasks) < _SHARED_TASKS:
            mark = self.asker.new_mark()
            keyed = Keyed("create", family.person, TASKS, content_of(mark), family.person.next_key(), mark)
            done = await self._insist(keyed)
            if done.ok:
                family.tasks.append(done.task["id"])
            return
        task = self.chance.choice(family.tasks)
        now = await self.asker.attempt("read", family.person, "GET", f"{TASKS}/{task}", task=task)
        if now.ok and self.chance.random() < 0.9:
            await self._write(
                "patch", family.person, "PATCH", task, now.etag, now.task["version"], keep=False
            )
        elif now.ok:
            await self._write("patch", family.person, "PATCH", task, None, now.task["version"], keep=False)

    async def _write(
        self,
        do: str,
        person: Person,
        method: str,
        task: str,
        etag: str | None,
        version: int,
        *,
        keep: bool = True,
    ) -> None:
        mark = self.asker.new_mark()
        facts: dict[str, Any] = {"mark": mark, "task": task}
        headers = ""
        if etag is not None:
            facts |= {"base": version, "if": etag}
            headers = f'if-match: "{etag}"\r\n'
        for _ in range(3):
            done = await self.asker.attempt(
                do, person, method, f"{TASKS}/{task}", body=content_of(mark), headers=headers,
                hang_up_after=self._impatience(), **facts,
            )  # fmt: skip
            if done.ok:
                if keep:
                    person.tasks[task] = (done.etag, done.task["version"])
                return
            if done.kind == "unknown" or done.status in (404, 412):
                if keep:
                    await self._look(person, task)
                return
            await self._breathe()
            if self.chance.random() < 0.5:
                return

    async def _delete(self) -> None:
        found = self._any_task()
        if found is None:
            return
        task, (etag, version) = found
        person, mark = self.person, self.asker.new_mark()
        del person.tasks[task]
        facts: dict[str, Any] = {"mark": mark, "task": task}
        headers = ""
        if self.chance.random() < 0.5:
            facts |= {"base": version, "if": etag}
            headers = f'if-match: "{etag}"\r\n'
        for _ in range(3):
            done = await self.asker.attempt(
                "delete", person, "DELETE", f"{TASKS}/{task}", headers=headers, **facts
            )
            if done.ok or done.status in (404, 412):
                return
            await self._breathe()

    # Reading

    async def _read(self) -> None:
        found = self._any_task()
        if found is None:
            return
        task, (etag, version) = found
        if self.chance.random() < 0.3:
            condition = f'if-none-match: "{etag}"\r\n'
            await self.asker.attempt(
                "read", self.person, "GET", f"{TASKS}/{task}", task=task, known=version, headers=condition
            )
        else:
            await self._look(self.person, task)

    async def _look(self, person: Person, task: str) -> None:
        for _ in range(3):
            now = await self.asker.attempt("read", person, "GET", f"{TASKS}/{task}", task=task)
            if now.ok:
                person.tasks[task] = (now.etag, now.task["version"])
            elif now.status == 404:
                person.tasks.pop(task, None)
            else:
                await self._breathe()
                continue
            return
        # What is not known is not written to.
        person.tasks.pop(task, None)

    async def _list_all(self) -> None:
        await self.asker.attempt("list", self.person, "GET", f"{TASKS}?limit=200")

    # Trying what must not work

    async def _foreign(self) -> None:
        if not self.town.tasks:
            return
        owner, task, etag = self.chance.choice(self.town.tasks)
        if owner == self.person.id:
            return
        mark, path = self.asker.new_mark(), f"{TASKS}/{task}"
        facts: dict[str, Any] = {"mark": mark, "task": task, "owner": owner}
        way = self.chance.randrange(4)
        if way == 0:
            await self.asker.attempt("foreign-read", self.person, "GET", path, **facts)
        elif way == 1:
            await self.asker.attempt("foreign", self.person, "PATCH", path, body=content_of(mark), **facts)
        elif way == 2:
            await self.asker.attempt("foreign", self.person, "DELETE", path, **facts)
        else:
            condition = f'if-match: "{etag}"\r\n'
            await self.asker.attempt(
                "foreign", self.person, "PUT", path, body=content_of(mark), headers=condition, **facts
            )

    async def _replay(self) -> None:
        if self.last_keyed is not None:
            first = self.last_keyed
            again = Keyed("replay", first.person, first.path, first.body, first.key, first.mark)
            await self._send(again)

    async def _reuse(self) -> None:
        if self.last_keyed is not None:
            first, mark = self.last_keyed, self.asker.new_mark()
            await self.asker.attempt(
                "reuse", first.person, "POST", body=content_of(mark), key=first.key, mark=mark
            )

    # How

    def _any_task(self) -> tuple[str, tuple[str, int]] | None:
        tasks = self.person.tasks
        if not tasks:
            return None
        # Mostly one of the newest, so that some are written to again and again.
        known = list(tasks)
        task = known[-1 - min(int(self.chance.expovariate(0.1)), len(known) - 1)]
        return task, tasks[task]

    def _own(self, person: Person, done: Outcome) -> None:
        person.tasks[done.task["id"]] = (done.etag, done.task["version"])
        person.made += 1
        if self.chance.random() < 0.2:
            self.town.tasks.append((person.id, done.task["id"], done.etag))

    def _impatience(self) -> float | None:
        """One in a hundred hangs up before it has the answer."""
        return self.chance.uniform(0.0, 0.006) if self.chance.random() < 0.01 else None

    async def _breathe(self) -> None:
        await asyncio.sleep(self.chance.uniform(0.02, 0.15))
