"""What may be said about issuers, secrets and keys, and what is refused at the start without being repeated."""

from __future__ import annotations

import base64
import json
import secrets
from typing import Any

import pytest

from src.config.auth import Issuer, weakness
from src.config.settings import as_environment, load_settings
from src.config.settings_docs import effective
from src.errors import ConfigurationError
from src.services.signing import new_key

ENTRY = {
    "issuer": "https://id.example.com/",
    "jwks_url": "https://id.example.com/jwks.json",
    "audience": "tasks",
}
STRONG = secrets.token_urlsafe(32)


def message(**settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**settings)
    return str(caught.value)


def issuers(*changes: dict[str, Any] | str) -> str:
    return json.dumps([{**ENTRY, **change} if isinstance(change, dict) else change for change in changes])


def test_issuers_are_read_from_json_and_handed_on_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_settings(auth_issuers=issuers({}, {"issuer": "two", "audience": ["a", "b"]}))
    assert given.auth_issuers == (
        Issuer("https://id.example.com/", "https://id.example.com/jwks.json", ("tasks",)),
        Issuer("two", "https://id.example.com/jwks.json", ("a", "b")),
    )
    for name, value in as_environment(given).items():
        monkeypatch.setenv(name, value)
    assert load_settings().auth_issuers == given.auth_issuers
    assert load_settings(auth_issuers="[]").auth_issuers == ()


@pytest.mark.parametrize(
    "url",
    [
        "https://id.example.com", "https://id.example.com:8443/a?b=c", "https://[2001:db8::1]/jwks",
        "http://127.0.0.1:8080/jwks", "http://localhost/jwks", "http://[::1]:9/jwks", "http://127.9.9.9/x",
        "http://id.localhost/jwks",
    ],
)  # fmt: skip
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    assert load_settings(auth_issuers=issuers({"jwks_url": url})).auth_issuers[0].jwks_url == url


@pytest.mark.parametrize(
    "value",
    [
        "x", "{}", '"x"', "[" * 5000, "null", json.dumps([ENTRY] * 17), issuers("x"), issuers({"more": 1}),
        json.dumps([{"issuer": "a", "jwks_url": "https://a"}]),
        issuers({"issuer": ""}), issuers({"issuer": 1}), issuers({"issuer": "a\nb"}), issuers({"issuer": "a" * 513}),
        issuers({"audience": ""}), issuers({"audience": []}), issuers({"audience": [1]}), issuers({"audience": None}),
        issuers({"jwks_url": 1}), issuers({"jwks_url": ""}), issuers({"jwks_url": "id.example.com"}),
        issuers({"jwks_url": "http://id.example.com/"}), issuers({"jwks_url": "http://10.0.0.1/"}),
        issuers({"jwks_url": "http://localhost.example.com/"}), issuers({"jwks_url": "http://127.0.0.1.nip.io/"}),
        issuers({"jwks_url": "ftp://id.example.com/"}), issuers({"jwks_url": "file:///etc/passwd"}),
        issuers({"jwks_url": "https://canary@id.example.com/"}), issuers({"jwks_url": "https://:canary@id.example.com/"}),
        issuers({"jwks_url": "https://id.example.com/#x"}), issuers({"jwks_url": "https://id.example.com:99999/"}),
        issuers({"jwks_url": "https://id.example.com:0/"}), issuers({"jwks_url": "https://id.example.com/ x"}),
        issuers({"jwks_url": "https://id.example.com/\r\nX: y"}), issuers({"jwks_url": "https:///x"}),
        issuers({"jwks_url": "https://[::1"}), issuers({"jwks_url": "https://ä.example.com/"}),
        issuers({"jwks_url": "https://a/" + "x" * 2048}), issuers({}, {}),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_issuers_that_cannot_be_trusted_or_understood_are_refused(value: str) -> None:
    said = message(auth_issuers=value)
    assert "AUTH_ISSUERS: " in said
    assert "canary" not in said


def test_every_fault_is_told_at_once_and_no_value() -> None:
    said = message(
        auth_issuers="[canary1]",
        signing_keys="canary2",
        auth_leeway_seconds=1000,
        auth_own_issuer="a\x00",
        port=-1,
    )
    for variable in ("AUTH_ISSUERS", "SIGNING_KEYS", "AUTH_LEEWAY_SECONDS", "AUTH_OWN_ISSUER", "PORT"):
        assert f"{variable}: " in said
    assert "canary" not in said


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({"auth_issuers": issuers({"issuer": "groundwork"})}, "AUTH_OWN_ISSUER"),
        ({"auth_shared_secret": STRONG, "auth_shared_issuer": "groundwork"}, "AUTH_OWN_ISSUER"),
        ({"auth_issuers": issuers({}), "auth_own_issuer": ENTRY["issuer"]}, "AUTH_OWN_ISSUER"),
        ({"auth_issuers": issuers({}), "auth_shared_secret": STRONG, "auth_shared_issuer": ENTRY["issuer"]},
         "AUTH_SHARED_ISSUER"),
        ({"auth_shared_issuer": "app"}, "AUTH_SHARED_ISSUER"),
        ({"auth_shared_audience": "app"}, "AUTH_SHARED_AUDIENCE"),
        ({"auth_passthrough_issuer": "app"}, "AUTH_PASSTHROUGH_ISSUER"),
        ({"auth_passthrough_issuer": "groundwork"}, "AUTH_PASSTHROUGH_ISSUER"),
        ({"auth_shared_secret": STRONG, "auth_passthrough_issuer": "app"}, "AUTH_PASSTHROUGH_ISSUER"),
    ],
)  # fmt: skip
def test_nobody_can_speak_for_another_issuer(settings: dict[str, Any], variable: str) -> None:
    assert f"{variable}: " in message(**settings)


WEAK = [
    "tooshort", "a" * 64, "0123456789" * 5, "0123456789abcdef0123456789abcdef", "abcdefghijklmnopqrstuvwxyz0123456789",
    "changeme" * 4, "change-me-change-me-change-me-please", "your-256-bit-secret-your-256-bit-secret",
    "a-string-secret-at-least-256-bits-long", "better-auth-secret-12345678901234567890",
    "supersecretsupersecretsupersecret", "my_super_secret_key_for_jwt_tokens_2024", "0" * 31 + "1", "x" * 31,
    "correct-password-of-the-application", "insecure-development-key-do-not-use!",
]  # fmt: skip


@pytest.mark.parametrize("secret", WEAK)
@pytest.mark.parametrize("environment", ["production", "test"])
def test_a_weak_shared_secret_is_refused_outside_development(environment: str, secret: str) -> None:
    said = message(environment=environment, auth_shared_secret=secret)
    assert "AUTH_SHARED_SECRET: " in said
    assert secret not in said
    assert load_settings(environment="development", auth_shared_secret=secret)


@pytest.mark.parametrize("missing", ["auth_shared_issuer", "auth_shared_audience"])
@pytest.mark.parametrize("environment", ["production", "test"])
def test_a_shared_secret_needs_its_issuer_and_audience_outside_development(
    environment: str, missing: str
) -> None:
    given = {"auth_shared_secret": STRONG, "auth_shared_issuer": "app", "auth_shared_audience": "tasks"}
    assert load_settings(environment=environment, **given).warnings == []
    del given[missing]
    assert f"{missing.upper()}: Must be set" in message(environment=environment, **given)
    warnings = load_settings(environment="development", **given).warnings
    assert [variable for variable, _ in warnings] == [missing.upper()]


def test_a_secret_made_by_chance_is_never_called_weak() -> None:
    for _ in range(500):
        for made in (secrets.token_hex(16), secrets.token_hex(32), secrets.token_urlsafe(32),
                     base64.b64encode(secrets.token_bytes(32)).decode()):  # fmt: skip
            assert weakness(made) is None


@pytest.mark.parametrize(
    "secret",
    [
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA",
        '{"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("environment", ["development", "production"])
def test_a_key_of_another_kind_is_no_secret_anywhere(environment: str, secret: str) -> None:
    assert "AUTH_SHARED_SECRET: " in message(environment=environment, auth_shared_secret=secret)


BAD_KEYS = {
    "no key": "x",
    "a prefix": "gwk_",
    "too few characters": "gwk_" + "A" * 42,
    "one byte": "gwk_" + "A" * 43,
    "no base64": "gwk_" + "!" * 43,
    "counting": base64.b64encode(bytes(range(32))).decode(),
    "a text": base64.b64encode(b"a text that is 32 characters lon").decode(),
    "a text twice": base64.b64encode(b"abcdefghijklmnop" * 2).decode(),
    "three keys": ",".join(new_key() for _ in range(3)),
    "one key twice": ",".join([new_key()] * 2),
    "a key cut off": new_key()[:-1],
    "a key and more": new_key() + "AAAA",
    "a default": "changeme",
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_signing_key_that_was_not_made_by_chance_is_refused_everywhere(case: str) -> None:
    text = BAD_KEYS[case]
    for environment in ("development", "production"):
        said = message(environment=environment, signing_keys=text)
        assert "SIGNING_KEYS: " in said
        assert "python -m src keys new" in said
        assert len(text) < 5 or text not in said


def test_a_signing_key_may_be_made_by_any_tool() -> None:
    for _ in range(100):
        data = secrets.token_bytes(32)
        for text in (
            base64.b64encode(data),
            base64.urlsafe_b64encode(data),
            base64.b64encode(data).rstrip(b"="),
        ):
            assert load_settings(signing_keys=text.decode())
        assert load_settings(signing_keys=new_key())


def test_what_is_printed_masks_every_secret() -> None:
    key = new_key()
    rows = effective(load_settings(auth_shared_secret=STRONG, signing_keys=key, auth_issuers=issuers({})))
    shown = {row.name: row.value for row in rows}
    assert shown["AUTH_SHARED_SECRET"] == shown["SIGNING_KEYS"] == "***"
    assert json.loads(shown["AUTH_ISSUERS"])[0]["issuer"] == ENTRY["issuer"]
    assert {row.name: row.value for row in effective(load_settings())}["AUTH_SHARED_SECRET"] == ""
