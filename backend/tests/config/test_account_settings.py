"""Accounts of our own: their settings are right by themselves, and a limit is refused before anything starts."""

from __future__ import annotations

import pytest

from src.config.accounts import may_sign_up, rules
from src.config.settings import Settings, as_environment, load_settings
from src.errors import ConfigurationError

LIMITS = ("LOGIN_RATE_LIMIT", "LOGIN_ADDRESS_RATE_LIMIT", "SIGN_UP_RATE_LIMIT", "REFRESH_RATE_LIMIT")
ISSUERS = (
    '[{"issuer": "https://id.example.com/", "jwks_url": "https://id.example.com/jwks.json", "audience": "a"}]'
)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    ("given", "taken", "counted"),
    [
        ("5/minute;30/hour", "5/minute;30/hour", [(5, 60), (30, 3600)]),
        (" 10 per 2 Minutes ", "10 per 2 minutes", [(10, 120)]),
        ("1/second,2/hour|3/day", "1/second,2/hour|3/day", [(1, 1), (2, 3600), (3, 86400)]),
        ("OFF", "off", []),
    ],
)
def test_a_limit_is_taken_in_the_notation_of_limits(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str, taken: str, counted: list[tuple[int, int]]
) -> None:
    monkeypatch.setenv(name, given)
    settings = load_settings()
    assert getattr(settings, name.lower()) == taken
    assert [(rule.amount, rule.get_expiry()) for rule in rules(taken)] == counted
    assert as_environment(settings)[name] == taken


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(
    "given",
    [
        "often",
        "5",
        "5/fortnight",
        "0/minute",
        "-1/minute",
        "5/0minutes",
        "1.5/minute",
        "1000001/minute",
        "5/2days",
        "5/year",
        "5/minute:;6/hour",
        "5/minute;",
        "1/second;2/minute;3/hour;4/day;5/day",
        "5/minute" * 100,
        "9" * 5000 + "/minute",
        "٥/minute",
    ],
)
def test_what_is_no_limit_is_refused_by_its_name_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    monkeypatch.setenv(name, given)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    (fault,) = refused.value.faults
    assert fault.variable == name
    assert given not in fault.problem
    assert "off" in fault.remedy


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("ACCESS_TOKEN_SECONDS", 60, 900),
        ("SESSION_IDLE_DAYS", 1, 3650),
        ("SESSION_MAX_DAYS", 1, 3650),
        ("PASSWORD_HASH_MEMORY_KIB", 19456, 262144),
        ("PASSWORD_HASH_TIME_COST", 2, 8),
        ("PASSWORD_HASH_THREADS", 1, 64),
        ("PASSWORD_HASH_QUEUE", 1, 10000),
    ],
)
def test_numbers_about_accounts_stay_within_their_bounds(
    monkeypatch: pytest.MonkeyPatch, name: str, least: int, most: int
) -> None:
    for value in (least, most):
        monkeypatch.setenv(name, str(value))
        assert getattr(load_settings(), name.lower()) == value
    for value in (least - 1, most + 1):
        monkeypatch.setenv(name, str(value))
        with pytest.raises(ConfigurationError) as refused:
            load_settings()
        assert [fault.variable for fault in refused.value.faults] == [name]


@pytest.mark.parametrize(
    ("given", "may"),
    [
        ({}, True),
        ({"SIGN_UP": "auto", "AUTH_ISSUERS": ISSUERS}, False),
        ({"AUTH_SHARED_SECRET": "zebra" * 8}, False),
        ({"SIGN_UP": "Open", "AUTH_ISSUERS": ISSUERS}, True),
        ({"SIGN_UP": "closed"}, False),
    ],
)
def test_strangers_may_sign_up_unless_somebody_else_knows_the_users(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], may: bool
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert may_sign_up(load_settings()) is may


def test_every_default_about_accounts_would_pass_if_it_were_given() -> None:
    fields = Settings.model_fields
    defaults = {name: fields[name].default for name in fields if "rate_limit" in name}
    assert len(defaults) == len(LIMITS)
    assert all(rules(limit) for limit in defaults.values())
    Settings(**defaults)
