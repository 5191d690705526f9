"""`python -m src keys ...`: the keys that sign our own tokens."""

from __future__ import annotations

import typer

from . import output

keys = typer.Typer(help="Make keys for SIGNING_KEYS.", **output.PLAIN)


@keys.callback()
def _group() -> None:
    # With one command only, typer would leave out its name.
    pass


@keys.command("new")
def keys_new() -> None:
    """Print a new key for SIGNING_KEYS.

    To rotate: put the new one behind the old with a comma, restart every worker, swap the two, restart again, and
    leave the old one out once its last tokens have ended.
    """
    from ..services.signing import new_key

    output.emit(new_key())
