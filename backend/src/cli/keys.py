"""`python -m src keys ...`: the keys that sign the service's own tokens."""

from __future__ import annotations

import click

from . import output


@click.group()
def keys() -> None:
    """Generate keys for SIGNING_KEYS."""


@keys.command("new")
def keys_new() -> None:
    """Print a new key for SIGNING_KEYS.

    To rotate: append the new key to the old one with a comma, restart every worker, swap the two, restart again,
    and remove the old key once its last tokens have expired.
    """
    from ..services.signing import new_key

    output.emit(new_key())
