"""What people paste is understood as they meant it, or refused by name and without a word of the password."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config.database import ConnectionSettings, Host, parse
from src.errors import ConfigurationError

NEON = "postgresql://u:p@ep-x-pooler.eu-central-1.aws.neon.tech/db"
NEON_CELL = "postgresql://u:p@ep-x-pooler.c-3.us-east-1.aws.neon.tech/db"


def told(pasted: str, **named: Any) -> dict[str, Any]:
    """The settings as a flat table, for comparing only what a row speaks of."""
    found: ConnectionSettings = parse(pasted, **named)
    return {
        "hosts": [(host.name, host.port) for host in found.hosts],
        "user": found.user,
        "password": None if found.password is None else found.password.get_secret_value(),
        "database": found.database,
        "mode": found.tls.mode,
        "root": found.tls.root_certificate,
        "certificate": found.tls.certificate,
        "key": found.tls.key,
        "negotiation": found.tls.negotiation,
        "pooler": found.pooler,
        "neon": found.neon,
        "settings": dict(found.server_settings),
        "attributes": found.target_session_attrs,
        "methods": found.authentication_methods,
        "timeout": found.connect_timeout_seconds,
        "application": found.application_name,
        "warned": len(found.warnings),
    }


SESSION = {"application_name": "groundwork", "timezone": "UTC"}
UNDERSTOOD: list[tuple[str, dict[str, Any]]] = [
    # What Neon hands out, pooled and direct.
    (f"{NEON}?sslmode=require&channel_binding=require",
     {"mode": "verify-full", "pooler": "tracking", "neon": True, "warned": 0, "password": "p", "database": "db"}),
    (f"{NEON_CELL}?sslmode=require", {"mode": "verify-full", "pooler": "tracking", "neon": True, "warned": 0}),
    ("postgresql://u:p@ep-x.eu.aws.neon.tech/db?sslmode=require", {"mode": "verify-full", "pooler": "none"}),
    (f"{NEON}?sslmode=prefer", {"mode": "verify-full", "warned": 0}),
    (f"{NEON}?sslmode=verify-ca", {"mode": "verify-full"}),
    (f"{NEON}?options=endpoint%3Dep-x",
     {"settings": {"application_name": "groundwork", "timezone": "UTC"}, "warned": 0}),
    ("postgresql://u:p@EP-X.EU.AWS.NEON.TECH./db", {"neon": True, "hosts": [("EP-X.EU.AWS.NEON.TECH", 5432)]}),
    ("postgresql://u:p@neon.tech.example.com/db", {"neon": False}),
    # What surrounds an address.
    ("'postgresql://u:p@h/db'", {"user": "u", "hosts": [("h", 5432)], "database": "db"}),
    ('"postgresql://u:p@h/db"', {"password": "p", "database": "db"}),
    ("psql 'postgresql://u:p@h/db?sslmode=require'", {"database": "db", "mode": "require"}),
    ('psql "postgresql://u:p@h/db"', {"database": "db"}),
    ("psql postgresql://u:p@h/db", {"database": "db"}),
    ("psql -d 'postgresql://u:p@h/db'", {"database": "db"}),
    ("$ psql 'postgresql://u:p@h/db';", {"database": "db"}),
    ("DATABASE_URL=postgresql://u:p@h/db", {"database": "db"}),
    ("export DATABASE_URL='postgresql://u:p@h/db'", {"database": "db"}),
    ("  postgresql://u:p@h/db \n", {"database": "db"}),
    # Schemes.
    ("postgres://u:p@h/db", {"hosts": [("h", 5432)]}),
    ("POSTGRESQL://u:p@h/db", {"hosts": [("h", 5432)]}),
    ("postgresql+asyncpg://u:p@h/db", {"hosts": [("h", 5432)]}),
    ("postgresql+psycopg2://u:p@h:1/db", {"hosts": [("h", 1)]}),
    ("jdbc:postgresql://h:1/db?user=u&password=p", {"hosts": [("h", 1)], "user": "u", "password": "p"}),
    # TLS, by name and by default.
    ("postgresql://u:p@h/db", {"mode": "verify-full", "root": None, "warned": 0}),
    ("postgresql://u:p@localhost/db", {"mode": "disable", "warned": 0}),
    ("postgresql://u:p@127.0.0.2/db", {"mode": "disable", "warned": 0}),
    ("postgresql://u:p@[::1]/db", {"mode": "disable", "warned": 0}),
    ("postgresql://u:p@localhost,h/db", {"mode": "verify-full"}),
    ("postgresql://u:p@localhost.example.com/db", {"mode": "verify-full"}),
    ("postgresql://u:p@h/db?sslmode=disable", {"mode": "disable", "warned": 1}),
    ("postgresql://u:p@h/db?sslmode=allow", {"mode": "allow", "warned": 1}),
    ("postgresql://u:p@h/db?sslmode=prefer", {"mode": "prefer", "warned": 1}),
    ("postgresql://u:p@localhost/db?sslmode=prefer", {"mode": "prefer", "warned": 0}),
    ("postgresql://u:p@h/db?sslmode=require", {"mode": "require", "warned": 1}),
    ("postgresql://u:p@h/db?ssl=require", {"mode": "require", "warned": 1}),
    ("postgresql://u:p@h/db?ssl=true", {"mode": "require", "warned": 1}),
    ("postgresql://u:p@h/db?sslmode=verify-full", {"mode": "verify-full", "warned": 0}),
    ("postgresql://u:p@h/db?sslmode=verify_full", {"mode": "verify-full"}),
    ("postgresql://u:p@h/db?sslmode=verify-ca&sslrootcert=/ca.pem", {"mode": "verify-ca", "root": "/ca.pem"}),
    ("postgresql://u:p@h/db?sslmode=verify-ca", {"mode": "verify-full"}),
    ("postgresql://u:p@h/db?sslmode=verify-ca&sslrootcert=system", {"mode": "verify-full", "root": None}),
    ("postgresql://u:p@h/db?sslmode=require&sslrootcert=/ca.pem", {"mode": "verify-full", "root": "/ca.pem"}),
    ("postgresql://u:p@h/db?sslmode=require&sslrootcert=system", {"mode": "verify-full", "root": None}),
    ("postgresql://u:p@h/db?sslmode=require&channel_binding=require", {"mode": "verify-full", "warned": 0}),
    ("postgresql://u:p@localhost/db?channel_binding=require", {"mode": "verify-full"}),
    ("postgresql://u:p@h/db?sslmode=require&channel_binding=prefer", {"mode": "require"}),
    ("postgresql://u:p@localhost/db?sslrootcert=%2Fmy%20ca.pem", {"mode": "verify-full", "root": "/my ca.pem"}),
    ("postgresql://u:p@h/db?sslcert=/c.pem&sslkey=/k.pem", {"certificate": "/c.pem", "key": "/k.pem"}),
    ("postgresql://u:p@h/db?sslnegotiation=direct&sslmode=require", {"mode": "verify-full", "negotiation": "direct"}),
    # Parameters.
    ("postgresql://u:p@h/db?options=-c%20search_path%3Dapp",
     {"settings": {"application_name": "groundwork", "timezone": "UTC", "search_path": "app"}}),
    ("postgresql://u:p@h/db?options=-c%20a.b%3D1%20--work-mem=8MB%20-cjit=off",
     {"settings": {"application_name": "groundwork", "timezone": "UTC", "a.b": "1", "work_mem": "8MB", "jit": "off"}}),
    (r"postgresql://u:p@h/db?options=-c%20a.b%3Dx%5C%20y",
     {"settings": {"application_name": "groundwork", "timezone": "UTC", "a.b": "x y"}}),
    ("postgresql://u:p@h/db?options=-c%20TimeZone%3DEurope/Paris", {"warned": 1}),
    ("postgresql://u:p@h/db?connect_timeout=10", {"timeout": 10.0}),
    ("postgresql://u:p@h/db?connect_timeout=0", {"timeout": None}),
    ("postgresql://u:p@h/db?application_name=my%20app", {"application": "my app"}),
    ("postgresql://u:p@h/db?application_name=me@work", {"application": "me@work", "hosts": [("h", 5432)]}),
    ("postgresql://u:p@h/db?fallback_application_name=x", {"application": "x"}),
    ("postgresql://u:p@a,b/db?target_session_attrs=read-write", {"attributes": "read-write"}),
    ("postgresql://u:p@h/db?keepalives=1&keepalives_idle=30&keepalives_interval=1&keepalives_count=3", {"warned": 0}),
    ("postgresql://u:p@h/db?gssencmode=disable&client_encoding=utf8", {"warned": 0}),
    ("postgresql://u:p@h/db?require_auth=scram-sha-256", {"methods": {"scram-sha-256"}}),
    ("postgresql://u:p@h/db?require_auth=md5,%20password", {"methods": {"md5", "password"}}),
    ("postgresql://u:p@h/db?require_auth=!none,!password,!md5", {"methods": {"gss", "sspi", "scram-sha-256"}}),
    ("postgresql://u:p@h/db?require_auth=", {"methods": None}),
    ("postgresql://u:p@h/db?sslmode=verify-ca&sslrootcert=/r", {"methods": None}),
    ("postgresql://u@/db?host=/run/postgresql", {"methods": None}),
    ("postgresql://u:p@localhost/db", {"methods": {"scram-sha-256", "none"}}),
    ("postgresql://u:p@h/db?sslmode=require", {"methods": {"scram-sha-256", "none"}}),
    ("postgresql://u:p@h/db?pgbouncer=true", {"pooler": "transaction"}),
    ("postgresql://u:p@aws-0.pooler.supabase.com:6543/db", {"pooler": "transaction"}),
    ("postgresql://u:p@h/db", {"pooler": "auto"}),
    # What providers and other drivers add.
    ("postgresql://postgres.ref:p@aws-0-eu.pooler.supabase.com:6543/postgres?pgbouncer=true&supa=base-pooler.x",
     {"pooler": "transaction", "warned": 0}),
    ("postgresql://u:p@AWS-0-EU.POOLER.SUPABASE.COM:6543/postgres", {"pooler": "transaction"}),
    ("postgres://u:p@h/db?sslmode=require&uselibpqcompat=true", {"mode": "require"}),
    ("postgres://u:p@h/db?sslmode=require&workaround=supabase-pooler.vercel", {"mode": "require"}),
    ("postgresql://u:p@h/db?schema=public&sslaccept=strict", {"settings": SESSION, "mode": "verify-full"}),
    ("postgresql://u:p@EP-X-POOLER.EU.AWS.NEON.TECH/db", {"pooler": "tracking", "neon": True}),
    ("postgresql://u:p@Ep-X-Pooler.c-3.us-east-1.aws.neon.tech/db", {"pooler": "tracking", "neon": True}),
    # Hosts.
    ("postgresql://u:p@a:1,b:2,c/db", {"hosts": [("a", 1), ("b", 2), ("c", 5432)]}),
    ("postgresql://u:p@/db?host=a,b&port=1,2", {"hosts": [("a", 1), ("b", 2)]}),
    ("postgresql://u:p@/db?host=a,b&port=7", {"hosts": [("a", 7), ("b", 7)]}),
    ("postgresql://u:p@/db?host=a:1&host=b:2", {"hosts": [("a", 1), ("b", 2)]}),
    ("postgresql://u:p@[2001:db8::1]:5433/db", {"hosts": [("2001:db8::1", 5433)], "mode": "verify-full"}),
    ("postgresql://u:p@[::1],[::2]:7/db", {"hosts": [("::1", 5432), ("::2", 7)]}),
    ("postgresql://u@/db?host=/run/postgresql", {"hosts": [("/run/postgresql", 5432)], "mode": "disable", "warned": 0}),
    ("postgresql://u@/db?host=/run/pg&port=7&sslmode=require", {"hosts": [("/run/pg", 7)], "mode": "disable"}),
    ("postgresql://u@%2Frun%2Fpg/db", {"hosts": [("/run/pg", 5432)], "password": None}),
    ("postgresql://u@%2Frun%2Fpg:7/db", {"hosts": [("/run/pg", 7)]}),
    ("postgresql://u:p@h:/db", {"hosts": [("h", 5432)]}),
    # Names and passwords.
    ("postgresql://u:p@h", {"database": "u"}),
    ("postgresql://u:p@h/", {"database": "u"}),
    ("postgresql://u%40corp:p@h/my%2Fdb", {"user": "u@corp", "database": "my/db"}),
    ("postgresql://u:p%25%40%3A%2F%20%C3%A9@h/db", {"password": "p%@:/ é"}),
    ("postgresql://u:p%@:/ é@h/db", {"password": "p%@:/ é", "hosts": [("h", 5432)], "database": "db"}),
    ("postgresql://u:a@b@h/db", {"password": "a@b", "hosts": [("h", 5432)]}),
    ("postgresql://u:a@b/c@h/db", {"password": "a@b/c", "hosts": [("h", 5432)]}),
    ("postgresql://u:a/b@h/db", {"password": "a/b"}),
    ("postgresql://u:1234/b@h/db", {"password": "1234/b"}),
    ("postgresql://u:a?b@h/db", {"password": "a?b"}),
    ("postgresql://u:a#b@h/db?sslmode=require", {"password": "a#b", "mode": "require"}),
    ("postgresql://u:a:b@h/db", {"password": "a:b"}),
    ("postgresql://u:100%@h/db", {"password": "100%"}),
    ("postgresql://u:a+b@h/db", {"password": "a+b"}),
    ("postgresql://u:'q\"@h/db", {"password": "'q\""}),
    ("postgresql://u:@h/db", {"password": None}),
    # libpq's other form.
    ("host=localhost port=5433 dbname=app user=me password='it\\'s \\\\ me'",
     {"hosts": [("localhost", 5433)], "database": "app", "user": "me", "password": "it's \\ me"}),
    ("host=/run/postgresql user=me", {"hosts": [("/run/postgresql", 5432)], "database": "me"}),
    ("host=a,b port=1,2 user=me sslmode = require", {"hosts": [("a", 1), ("b", 2)], "mode": "require"}),
    ('psql "host=h user=me dbname=x"', {"hosts": [("h", 5432)], "database": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("pasted", "expected"), UNDERSTOOD, ids=[pasted for pasted, _ in UNDERSTOOD])
def test_a_pasted_address_means_what_its_author_meant(pasted: str, expected: dict[str, Any]) -> None:
    found = told(pasted)
    assert {key: found[key] for key in expected} == expected


REFUSED: list[tuple[str, str]] = [
    ("", "empty"),
    ("   ", "empty"),
    ("mysql://u:zebra@h/db", "mysql"),
    ("zebra", "not a PostgreSQL address"),
    ("postgresql://u:zebra@h/db?sslmod=require", "sslmod .*\n.*Did you mean sslmode"),
    ("postgresql://u:zebra@h/db?passfile=/x", "passfile"),
    ("postgresql://u:zebra@h/db?service=x", "service"),
    ("postgresql://u:zebra@h/db?connection_limit=5", "connection_limit .*\n.*DATABASE_POOL_SIZE"),
    ("postgresql://u:zebra@h/db?foo=1&bar=2", "(?s)foo.*bar"),
    ("postgresql://u:zebra@h/db?sslmode=zebra", "disable, allow, prefer, require, verify-ca, verify-full"),
    ("postgresql://u:zebra@h/db?channel_binding=zebra", "channel_binding"),
    ("postgresql://u:zebra@h/db?sslmode=disable&channel_binding=require", "contradicts"),
    (f"{NEON}?sslmode=disable", "contradicts Neon"),
    ("postgresql://u:zebra@h/db?gssencmode=require", "gssencmode"),
    ("postgresql://u:zebra@h/db?sslkey=/k", "sslcert"),
    ("postgresql://u:zebra@h/db?sslcert=/c&sslkey=/k&sslmode=prefer", "sslcert needs TLS"),
    ("postgresql://u:zebra@h/db?connect_timeout=soon", "connect_timeout"),
    ("postgresql://u:zebra@h/db?target_session_attrs=zebra", "target_session_attrs"),
    ("postgresql://u:zebra@h/db?require_auth=zebra", "require_auth .*\n.*scram-sha-256"),
    ("postgresql://u:zebra@h/db?require_auth=!md5,none", "require_auth"),
    ("postgresql://u:zebra@h/db?options=-f%20zebra", "options"),
    ("postgresql://u:zebra@h/db?client_encoding=latin1", "client_encoding"),
    ("postgresql://u:zebra@h/db?sslmode=require&sslmode=disable", "given twice"),
    ("postgresql://u:zebra@ep-x-pooler.neon.tech/db?options=-c%20search_path%3Dx", "(?s)pooler.*ALTER ROLE"),
    ("postgresql://u:zebra@h:99999/db", "host, port"),
    ("postgresql://u:zebra@h:0/db", "host, port"),
    ("postgresql://u:zebra@h:port/db", "host, port"),
    ("postgresql://u:zebra@::1/db", "host, port"),
    ("postgresql://u:zebra@/db", "no host"),
    ("postgresql:///db", "no user"),
    ("postgresql://h/db", "no user"),
    ("postgresql://u:zebra%ff@h/db", "UTF-8"),
    ("postgresql://u:zebra%00@h/db", "NUL"),
    ("postgresql://u:zeb\nra@h/db", "line break"),
    ("postgresql://u:zebra@evil?x=y@h/db", "more than one way"),
    # What providers and other drivers add, with what to use instead.
    ("postgresql://u:zebra@h/db?sslmode=no-verify", "sslmode .*\n.*sslmode=require for node-postgres"),
    ("postgresql://u:zebra@h/db?schema=app", "schema .*\n.*search_path"),
    ("postgresql://u:zebra@h/db?pool_timeout=5", "pool_timeout .*\n.*DATABASE_POOL_TIMEOUT_SECONDS"),
    ("postgresql://u:zebra@h/db?sslaccept=accept_invalid_certs", "sslaccept .*\n.*sslmode=verify-full"),
    ("prisma+postgres://accelerate.prisma-data.net/?api_key=zebra", "prisma"),
    # Invisible characters inside an address, which are part of no name.
    ("postgresql://u:zebra@h/db\u200b?sslmode=require", "invisible"),
    ("postgresql://u:zebra@h\ufeff/db", "invisible"),
    ("postgresql://u:zebra@h/d\u00a0b", "invisible"),
    ("host=h user=u dbname=db\u2060 password=zebra", "invisible"),
    # Placeholders.
    ("postgresql://postgres.ref:[YOUR-PASSWORD]@h:6543/postgres", "placeholder"),
    ("postgresql://u:$(DB_PASSWORD)@h/db", "placeholder"),
    ("postgresql://u:${DB_PASSWORD}@h/db", "placeholder"),
    ("postgresql://u:$DB_PASSWORD@h/db", "placeholder"),
    ("postgresql://u:<password>@h/db", "placeholder"),
    ("postgresql://<user>:zebra@h/db", "placeholder"),
    ("postgresql://u:zebra@[HOST]:5432/db", "placeholder"),
    ("postgresql://u:zebra@h/<database>?sslmode=require", "placeholder"),
    ("postgresql://{{ user }}:zebra@h/db", "placeholder"),
    ("postgresql://u:****************@ep-x.eu.aws.neon.tech/db", "placeholder"),
    ("host=h user=u password=[YOUR-PASSWORD]", "placeholder"),
    ("host=h user=u password='<password>'", "placeholder"),
    ("host=h user=u password='zebra", "key=value"),
    ("host=h user=u password=zebra nonsense=1", "nonsense"),
]


@pytest.mark.parametrize(("pasted", "words"), REFUSED, ids=[repr(pasted) for pasted, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name_and_without_the_password(pasted: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        parse(pasted, variable="DATABASE_MIGRATION_URL")
    text = str(refusal.value)
    assert re.search(words, text), text
    assert all(fault.variable == "DATABASE_MIGRATION_URL" and fault.remedy for fault in refusal.value.faults)
    assert "zebra" not in text
    assert refusal.value.__cause__ is None
    assert refusal.value.__context__ is None


@pytest.mark.parametrize(
    "password", ["[YOUR-PASSWORD]", "${X}", "<x>", "$(x)", "$SECRET", "*" * 16, "x\u200b"]
)
def test_a_password_that_looks_like_a_placeholder_is_accepted_percent_encoded(password: str) -> None:
    found = parse(f"postgresql://u:{quote(password, safe='')}@h/db")
    assert found.password is not None
    assert found.password.get_secret_value() == password


@pytest.mark.parametrize("password", ["a${HOME}b", "[x", "a<b>c", "$5", "pa$$word", "**", "{x}"])
def test_a_password_that_only_contains_such_characters_is_no_placeholder(password: str) -> None:
    found = parse("postgresql://u:PASSWORD@h/db".replace("PASSWORD", password))
    assert found.password is not None
    assert found.password.get_secret_value() == password


@pytest.mark.parametrize("around", ["\n", "\r\n", "\u200b", "\ufeff", "\u00a0", "\u200b\n\u2060"], ids=ascii)
def test_invisible_characters_around_an_address_are_removed(around: str) -> None:
    found = parse(f"{around}{NEON}{around}")
    assert (found.user, found.database) == ("u", "db")


def test_all_faults_of_an_address_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        parse("postgresql://h/db?sslmode=x&foo=1&connect_timeout=y&gssencmode=require")
    assert len(refusal.value.faults) == 5


def test_the_pooler_named_by_the_operator_beats_the_guess() -> None:
    assert parse(NEON, pooler="transaction").pooler == "transaction"
    assert parse("postgresql://u:p@h/db", pooler="tracking").pooler == "tracking"
    with pytest.raises(ConfigurationError, match="ALTER ROLE"):
        parse("postgresql://u:p@h/db?options=-c%20jit%3Doff", pooler="transaction")
    assert parse("postgresql://u:p@h/db?options=-c%20DateStyle%3DISO", pooler="transaction")


def test_the_direct_host_is_derived_from_the_pooled_one() -> None:
    direct = parse(NEON_CELL).direct()
    assert parse(NEON_CELL.replace("-pooler", "-POOLER")).direct().hosts == direct.hosts
    assert direct.hosts == (Host("ep-x.c-3.us-east-1.aws.neon.tech"),)
    assert direct.pooler == "none"
    assert direct.tls.mode == "verify-full"
    plain = parse("postgresql://u:p@my-pooler-db.example.com/db", pooler="transaction")
    assert plain.direct() is plain


def test_another_database_keeps_everything_else() -> None:
    found = parse(f"{NEON}?application_name=x")
    other = found.with_database("other")
    assert other.database == "other"
    assert (other.hosts, other.user, other.password, other.tls) == (
        found.hosts,
        found.user,
        found.password,
        found.tls,
    )


@pytest.mark.parametrize(
    "pasted",
    [
        "postgresql://u%40corp:zebra@a:1,[::1]:2/my%2Fdb?sslmode=verify-ca&sslrootcert=/my%20ca.pem",
        "postgresql://u@/db?host=/run/postgresql&port=7",
        "postgresql://u:zebra@a,%2Frun%2Fpg/db?target_session_attrs=primary",
    ],
)
def test_the_redacted_address_reads_back_as_the_same_without_the_password(pasted: str) -> None:
    found = parse(pasted)
    again = parse(found.redacted())
    assert "zebra" not in found.redacted()
    for name in ("hosts", "user", "database", "tls", "target_session_attrs"):
        assert getattr(again, name) == getattr(found, name)


def test_asyncpg_is_left_nothing_to_guess() -> None:
    """Every argument whose absence sends asyncpg to a PG* variable or a file is given."""
    arguments = parse("postgresql://u@127.0.0.1/db").asyncpg_arguments()
    guessed = {
        "host",
        "port",
        "user",
        "password",
        "database",
        "ssl",
        "direct_tls",
        "target_session_attrs",
        "krbsrvname",
        "gsslib",
    }
    assert guessed <= set(arguments)
    assert all(arguments[name] is not None for name in guessed)


# Whatever a password is: percent-encoded it arrives unchanged, raw it arrives unchanged or is refused in silence.

PASSWORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffd"), min_size=1, max_size=24
)
ODD = st.text("p%@:/?#&=+[], é'\"\\", min_size=1, max_size=12)


@given(PASSWORDS | ODD)
@settings(max_examples=300, deadline=None)
def test_any_percent_encoded_password_arrives_unchanged(password: str) -> None:
    found = parse(f"postgresql://u:{quote(password, safe='')}@h:1/db?sslmode=require")
    assert found.password is not None
    assert found.password.get_secret_value() == password
    assert found.hosts == (Host("h", 1),)


@given(ODD | PASSWORDS)
@settings(max_examples=500, deadline=None)
def test_a_raw_password_never_changes_where_it_is_sent(password: str) -> None:
    password = f"S3cr{password}et"
    try:
        found = parse(f"postgresql://u:{password}@real.example.com:1/db")
    except ConfigurationError as error:
        assert password not in str(error)  # noqa: PT017 - either outcome is right
        return
    assert found.hosts == (Host("real.example.com", 1),)
    assert found.database == "db"


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_refused_and_never_crashes(text: str) -> None:
    for pasted in (text, f"postgresql://{text}", f"postgresql://u:p@h/db?{text}", f"host={text}"):
        try:
            parse(pasted)
        except ConfigurationError as error:
            assert error.faults  # noqa: PT017 - either outcome is right
