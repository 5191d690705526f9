"""Statements: written with SQLModel expressions, compiled once to the driver's own form.

A `Statement` is declared at module level beside the functions that use it; it is compiled the first time it
runs. Values are bound by name (`bindparam("owner")`) and sent in the order in which the compiled text numbers
them, so the SQL text is the same at every call and the server's prepared statement is reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any

from sqlalchemy import ClauseElement
from sqlalchemy.dialects.postgresql import asyncpg as asyncpg_dialect


class Statement:
    """One named statement.

    `build` returns the SQLAlchemy expression (called once, on first use, so that importing costs nothing).
    `repeatable` says that running it twice does no harm: reads are, writes are not unless they say so.
    `writes` tells a write that may be repeated from a read: when its answer is lost for good, the outcome is
    not known. `within_seconds` bounds a read whose cost its parameters decide; past it, `Unavailable`
    (`statement-timeout`). Constants inside the expression (a LIMIT, a literal) are bound along with the named
    parameters.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], ClauseElement],
        *,
        repeatable: bool,
        writes: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        self.name = name
        self.repeatable = repeatable
        self.writes = not repeatable if writes is None else writes
        self.within_seconds = within_seconds
        self._build = build

    def __repr__(self) -> str:
        return f"Statement({self.name!r})"

    @cached_property
    def _compiled(self) -> tuple[str, tuple[str, ...], Mapping[str, Any]]:
        compiled = self._build().compile(
            dialect=asyncpg_dialect.dialect(),  # type: ignore[no-untyped-call]
            compile_kwargs={"render_postcompile": True},
        )
        names = tuple(compiled.positiontup or ())  # type: ignore[attr-defined]
        constants = {key: value for key, value in compiled.params.items() if value is not None}
        return f"/* {self.name} */ {compiled}", names, constants

    @property
    def sql(self) -> str:
        """The text with `$1, $2, ...`, led by a comment that names the statement in the server's logs."""
        return self._compiled[0]

    @cached_property
    def _in_order(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        names = self._compiled[1]
        # Of one name `itemgetter` makes no tuple, and of none it makes nothing.
        return itemgetter(*names) if len(names) > 1 else lambda values: tuple(values[name] for name in names)

    def arguments(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values in the order of the text's placeholders; a missing one raises `KeyError`."""
        constants = self._compiled[2]
        return self._in_order({**constants, **values} if constants else values)
