"""What must not be: the histories of the clients, held against each other and against the tables at the end.

Each finding is a column and a sentence. A column is forbidden, all of them have to be empty.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from .history import CHANGES, History, Intention, Sight

COLUMNS: Final = {
    "lost": "acknowledged and not there, or there with other content",
    "doubled": "done twice",
    "phantom": "there, and nobody asked for it",
    "lie": "answered that nothing was written, and written",
    "undead": "deleted, and there again",
    "lost-update": "two writers on one version, or a version overwritten unseen",
    "stale": "older than what had been acknowledged or seen before",
    "backwards": "older than what the same client had seen before",
    "isolation": "a row of another person seen, changed or deleted",
    "contract": "an answer outside the contract",
    "renewal": "a request that failed while workers were renewed",
    "settling": "unknown under a key, and not settled when all was well again",
    "recovery": "no recovery within 20 s of a fault's end",
    "process": "a process that ended, or did not end, as it should",
    "verify": "what `verify` says of the database afterwards",
}

_ISOLATION: Final = {"row-of-another-person", "foreign-task-reached"}
_DOUBLED: Final = {"another-answer-to-the-same-key", "key-taken-for-another-request"}


@dataclass(slots=True)
class Row:
    """A task as it lies in the table at the end."""

    user: str
    task: str
    title: str
    version: int
    whole: bool
    """Whether the rest of it is what its title, which is its mark, stands for."""


@dataclass
class Findings:
    """Sentences by column; `counts` goes on counting where the sentences stop."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    words: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, column: str, word: str, sentence: str) -> None:
        self.counts[column] += 1
        self.words[column][word] += 1
        if len(self.examples[column]) < 20:
            self.examples[column].append(f"{word}: {sentence}")

    @property
    def clean(self) -> bool:
        return not any(self.counts.values())


def check(
    history: History, rows: Iterable[Row], keys: dict[tuple[str, str], str | None], into: Findings
) -> None:
    """One family: its history, all rows of its users, and what is kept under their keys (the task made by it)."""
    for word, where in history.breaches:
        column = "isolation" if word in _ISOLATION else "doubled" if word in _DOUBLED else "contract"
        into.add(column, word, where)
    by_task: dict[tuple[str, str], list[Intention]] = defaultdict(list)
    for intention in history.intentions.values():
        if len(intention.told) > 1:
            into.add("doubled", "several-ids", f"{intention.mark} made {sorted(intention.told)}")
        for task in intention.told or ({intention.task} if intention.task else ()):
            by_task[intention.user, task].append(intention)
    sights: dict[tuple[str, str], list[Sight]] = defaultdict(list)
    for sight in history.sights:
        sights[sight.user, sight.task].append(sight)
    left = {(row.user, row.task): row for row in rows}
    refused: dict[tuple[str, str], list[tuple[Intention, int, float, float]]] = defaultdict(list)
    for refusal in history.refusals:
        task = refusal.intention.task
        if task is not None:
            refused[refusal.intention.user, task].append(
                (refusal.intention, refusal.status, refusal.asked, refusal.told)
            )
    _rows_are_meant(history, left, into)
    for place, intentions in by_task.items():
        _Task(history, place, intentions, sights.get(place, []), left.get(place), into).judge(
            refused.get(place, [])
        )
    for place, seen in sights.items():
        if place not in by_task:
            _seen_of_nobody(history, seen, into)
    _lists_are_whole(history, by_task, into)
    _keys_tell_the_truth(history, keys, into)


def _rows_are_meant(history: History, left: dict[tuple[str, str], Row], into: Findings) -> None:
    marks: dict[str, Row] = {}
    for row in left.values():
        other = marks.setdefault(row.title, row)
        if other is not row:
            into.add("doubled", "two-rows", f"{row.title} is in {other.task} and in {row.task}")
        intention = history.intentions.get(row.title) or history.intentions.get(row.title.partition("/")[0])
        if row.title in history.barred:
            into.add(_barred(history, row.title), "barred-and-stored", f"{row.title} stands in {row.task}")
        elif intention is None or intention.user != row.user:
            into.add("phantom", "unknown-mark", f"{row.title} in {row.task} of {row.user}")
        elif intention.failed:
            into.add(
                "lie", "failed-and-stored", f"{row.title} in {row.task}, first sent at {intention.first:.3f}"
            )
        elif not row.whole:
            into.add("lost", "other-content", f"{row.title} in {row.task}")


def _barred(history: History, mark: str) -> str:
    return "doubled" if history.barred[mark] == "reuse" else "isolation"


def _seen_of_nobody(history: History, seen: list[Sight], into: Findings) -> None:
    """Tasks that no acknowledgement named: of a creation that is unknown, or nobody's."""
    for sight in seen:
        if sight.mark is None:
            continue
        intention = history.intentions.get(sight.mark) or history.intentions.get(sight.mark.partition("/")[0])
        if intention is None or intention.user != sight.user:
            into.add("phantom", "seen", f"{sight.mark} in {sight.task} by {sight.client}")
        elif intention.failed:
            into.add("lie", "failed-and-seen", f"{sight.mark} by {sight.client} at {sight.asked:.3f}")


def _lists_are_whole(
    history: History, by_task: dict[tuple[str, str], list[Intention]], into: Findings
) -> None:
    """A list that says it is whole has every task that was there all the while."""
    of_user: dict[str, list[tuple[str, list[Intention]]]] = defaultdict(list)
    for (user, task), intentions in by_task.items():
        of_user[user].append((task, intentions))
    for client, user, asked, told, seen in history.lists:
        for task, intentions in of_user[user]:
            made = any(
                each.do not in CHANGES
                and each.do != "delete"
                and each.acked is not None
                and each.acked < asked
                for each in intentions
            )
            gone = any(each.do == "delete" and not each.failed and each.first < told for each in intentions)
            if made and not gone and task not in seen:
                into.add("stale", "missing-from-list", f"{task} for {client} at {asked:.3f}")


def _keys_tell_the_truth(history: History, keys: dict[tuple[str, str], str | None], into: Findings) -> None:
    for intention in history.intentions.values():
        if intention.key is None:
            continue
        place = (intention.user, intention.key)
        if intention.acked is not None and place not in keys:
            into.add("lost", "key", f"{intention.mark} under {intention.key}")
        elif intention.acked is not None and intention.do == "create" and keys[place] not in intention.told:
            into.add("doubled", "key-of-another-task", f"{intention.mark} under {intention.key}")
        elif intention.failed and place in keys:
            into.add("lie", "failed-and-kept", f"{intention.mark} under {intention.key}")


class _Task:
    """Everything that is known of one task of one user."""

    def __init__(
        self,
        history: History,
        place: tuple[str, str],
        intentions: list[Intention],
        sights: list[Sight],
        row: Row | None,
        into: Findings,
    ) -> None:
        self.history = history
        self.user, self.task = place
        self.made = [each for each in intentions if each.do not in CHANGES and each.do != "delete"]
        self.changes = [each for each in intentions if each.do in CHANGES]
        self.deletions = [each for each in intentions if each.do == "delete"]
        self.sights = sights
        self.row = row
        self.into = into
        acked = [each for each in (*self.made, *self.changes) if each.acked is not None]
        self.versions: dict[int, str] = {}
        for each in acked:
            self._name(each.version, each.mark)
        for sight in sights:
            if sight.mark is not None:
                self._name(sight.version, sight.mark)
        # What stayed unknown may have been seen since.
        self.seen_as = {mark: version for version, mark in self.versions.items()}
        # What had been told before a moment, by anybody.
        known = [(each.acked, each.version or 0) for each in acked if each.acked is not None]
        known += [(sight.told, sight.version) for sight in sights if sight.version is not None]
        known.sort()
        self.moments = [moment for moment, _ in known]
        self.highest = list(accumulate((version for _, version in known), max))

    def _name(self, version: int | None, mark: str) -> None:
        if version is not None and self.versions.setdefault(version, mark) != mark:
            self._say(
                "lost-update", "two-contents", f"version {version} is {self.versions[version]} and {mark}"
            )

    def _say(self, column: str, word: str, sentence: str) -> None:
        self.into.add(column, word, f"{self.task}: {sentence}")

    def judge(self, refused: list[tuple[Intention, int, float, float]]) -> None:
        self._end()
        self._updates()
        for sight in self.sights:
            self._sight(sight)
        for intention, status, asked, told in refused:
            self._refusal(intention, status, asked, told)

    def _end(self) -> None:
        acked = [each for each in self.made if each.acked is not None]
        deletable = [each for each in self.deletions if not each.failed]
        if self.row is None:
            if acked and not deletable:
                self._say("lost", "gone", f"{acked[0].mark} was acknowledged at {acked[0].acked:.3f}")
            return
        if gone := [each for each in self.deletions if each.acked is not None]:
            self._say("undead", "row", f"deleted by {gone[0].mark} at {gone[0].acked:.3f}")
        if not self.made or self.row.title in self.history.barred:
            return
        known = [each for each in self.changes if each.acked is not None]
        open_ones = [each for each in self.changes if each.unknown and each.acked is None]
        highest = max([1, *(each.version or 1 for each in known)])
        if self.row.version < highest:
            self._say("lost", "older-version", f"{self.row.version} where {highest} was acknowledged")
        elif self.row.version > 1 + len(known) + len(open_ones):
            self._say(
                "doubled", "version", f"{self.row.version} after {len(known)} + {len(open_ones)} changes"
            )
        elif self.versions.get(self.row.version, self.row.title) != self.row.title:
            self._say(
                "lost", "overwritten", f"{self.row.title} where {self.versions[self.row.version]} was told"
            )

    def _updates(self) -> None:
        bases: dict[str, str] = {}
        for each in self.changes:
            if each.acked is None or each.version is None:
                continue
            if each.tag is not None and each.base is not None:
                other = bases.setdefault(each.tag, each.mark)
                if other != each.mark:
                    self._say("lost-update", "one-base", f"{other} and {each.mark} on {each.tag}")
                if each.version != each.base + 1:
                    self._say("lost-update", "skipped", f"{each.mark} made {each.version} of {each.base}")
            before = self._told_before(each.first)
            if each.version <= before:
                self._say("lost-update", "not-newer", f"{each.mark} made {each.version} after {before}")
            elif each.tag is None and each.version > before + 1:
                self._jump(each, before)

    def _jump(self, change: Intention, before: int) -> None:
        """Without a condition a change makes the next version, or one later where others may have changed it too."""
        others = sum(
            1
            for each in self.changes
            if each is not change
            and not each.failed
            and each.first < (change.acked or 0)
            and (self._version_of(each) is None or before < (self._version_of(each) or 0))
        )
        assert change.version is not None
        if change.version > before + 1 + others:
            self._say(
                "doubled", "jump", f"{change.mark} made {change.version} after {before} and {others} others"
            )

    def _sight(self, sight: Sight) -> None:
        before = self._told_before(sight.asked)
        deleted = [each for each in self.deletions if each.acked is not None and each.acked < sight.asked]
        if sight.version is None:
            maybe = [each for each in self.deletions if not each.failed and each.first < sight.told]
            if before and not maybe:
                self._say("lost", "not-seen", f"404 for {sight.client} at {sight.asked:.3f}")
            return
        if deleted:
            self._say("undead", "seen", f"by {sight.client} at {sight.asked:.3f}")
        if sight.version < before:
            mine = any(
                other.client == sight.client
                and other.told < sight.asked
                and other.version is not None
                and other.version > sight.version
                for other in self.sights
            )
            column = "backwards" if mine else "stale"
            self._say(
                column, "read", f"{sight.version} for {sight.client} at {sight.asked:.3f} after {before}"
            )
        if sight.mark is not None:
            self._seen_is_meant(sight, sight.mark)

    def _seen_is_meant(self, sight: Sight, mark: str) -> None:
        intention = self.history.intentions.get(mark) or self.history.intentions.get(mark.partition("/")[0])
        if mark in self.history.barred:
            self._say(_barred(self.history, mark), "barred-and-seen", f"{mark} by {sight.client}")
        elif intention is None or intention.user != sight.user:
            self._say("phantom", "seen", f"{mark} by {sight.client}")
        elif intention.failed:
            self._say("lie", "failed-and-seen", f"{mark} by {sight.client} at {sight.asked:.3f}")
        elif intention.first > sight.told:
            self._say("phantom", "before-it-was-asked-for", f"{mark} by {sight.client}")

    def _refusal(self, intention: Intention, status: int, asked: float, told: float) -> None:
        deletions = [
            each
            for each in self.deletions
            if not each.failed and each.first < told and (each is not intention or each.unknown)
        ]
        if status == 404:
            if self._told_before(asked) and not deletions:
                self._say("lost", "not-found", f"{intention.mark} was told 404 at {asked:.3f}")
            return
        if intention.do == "place" or intention.base is None:
            if not (intention.unknown or self.made):
                self._say("contract", "refused", f"{intention.mark} was told 412 at {asked:.3f}")
            return
        newer = any(
            not each.failed
            and each.first < told
            and (self._version_of(each) is None or (self._version_of(each) or 0) > intention.base)
            for each in self.changes
        )
        if not newer and not deletions:
            self._say("contract", "refused-condition", f"{intention.mark} was told 412 at {asked:.3f}")

    def _version_of(self, change: Intention) -> int | None:
        return change.version if change.version is not None else self.seen_as.get(change.mark)

    def _told_before(self, moment: float) -> int:
        place = bisect_left(self.moments, moment)
        return self.highest[place - 1] if place else 0
