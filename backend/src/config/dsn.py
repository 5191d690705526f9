"""The grammar of a database address as people paste it: text in, parts out.

libpq's rules decide: a URL, or `key=value` pairs. In addition, shells' and dashboards' wrapping is removed, and a
password that was not percent-encoded is accepted if the URL has only one reading. Problems never quote the text,
because any piece of a text that was not understood may be a piece of the password.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from urllib.parse import unquote_to_bytes

from .sources import clean

DEFAULT_PORT = 5432
EXAMPLE = "postgresql://user:password@host:5432/database"
_ENCODE = (
    "Percent-encode the password (@ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25), for example "
    f"{EXAMPLE}."
)

# postgresql+asyncpg:// and the like name a Python driver.
_SCHEME = re.compile(r"(?i)(?:jdbc:)?postgres(?:ql)?(?:\+[a-z0-9_]+)?://")
_OTHER_SCHEME = re.compile(
    r"(?i)(mysql|mariadb|sqlite|mongodb|redis|mssql|oracle|prisma|https?)(?:\+[a-z]+)?://"
)
_BEFORE = re.compile(
    r"(?:\$\s+)?(?:export\s+)?(?:[A-Z][A-Z0-9_]*URL\s*=\s*)?(?:psql\s+(?:(?:-d|--dbname)[\s=]+)?)?"
)
_QUOTES = {"'": "'", '"': '"', "`": "`", "‘": "’", "“": "”"}
# A whole part of the address: [YOUR-PASSWORD], <password>, $(DB_PASSWORD), ${PASSWORD}, $PASSWORD, {{ x }}, and the
# asterisks that Neon shows. Three are what `redacted()` prints.
_PLACEHOLDER = re.compile(
    r"(?:^|[/:@='])(?:\[[A-Za-z][\w -]*\]|<[\w -]+>|\$\(\w+\)|\$\{\w+\}|\$[A-Z][A-Z0-9_]+|\{\{[\w .]+\}\}|\*{4,})"
    r"(?=[:@/?,'\s]|\Z)"
)
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.%-]+)?)\]|([^:\[\]]*))(?::([0-9]*))?\Z")
_HOST_NAME = re.compile(r"[\w.-]+\Z")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,40}\Z")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PAIR = re.compile(r"\s*([A-Za-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|\Z)")


@dataclass(frozen=True, slots=True)
class Host:
    """A host name, an IP address without brackets, or the directory of a Unix socket."""

    name: str
    port: int = DEFAULT_PORT

    @property
    def is_socket(self) -> bool:
        return self.name.startswith("/")

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(slots=True)
class Dsn:
    """The decoded parts of an address, and the problems found in it. An absent part is None or empty."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    hosts: list[Host] = field(default_factory=list)
    database: str | None = None
    parameters: dict[str, str] = field(default_factory=dict, repr=False)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def fault(self, problem: str, remedy: str) -> None:
        if (problem, remedy) not in self.problems:
            self.problems.append((problem, remedy))

    def add_parameter(self, key: str, value: str) -> None:
        # SQLAlchemy writes a host list as host=a&host=b.
        if key == "host" and self.parameters.get("host"):
            value = f"{self.parameters['host']},{value}"
        elif self.parameters.get(key, value) != value:
            self.fault(f"The parameter {key} is given twice, with different values.", "Keep one of them.")
        self.parameters[key] = value

    def move_parameters(self) -> None:
        """Move user, password, database, host and port out of the parameters, where libpq also accepts them."""
        take = self.parameters.pop
        self.user = take("user", "") or self.user
        self.password = take("password", "") or self.password
        self.database = take("dbname", "") or take("database", "") or self.database
        host, port = take("host", ""), take("port", "")
        names = ",".join(f"[{each.name}]" if ":" in each.name else each.name for each in self.hosts)
        if host or (port and names):
            hosts = _hosts(host or names, ports=port, parameter=True)
            if hosts is None:
                self.fault("Has a host or port parameter that is not valid.", f"For example {EXAMPLE}.")
            self.hosts = hosts or []


def parse_dsn(text: str, known: Collection[str]) -> Dsn:
    """Take an address apart. Raises nothing: see `problems`.

    `known` are the parameters that exist; they tell a parameter from a piece of a password that was not encoded.
    """
    text = _unwrap(text)
    if not text:
        return _refused("Is empty.", f"For example {EXAMPLE}.")
    if not text.isprintable():
        return _refused(
            "Contains a line break or an invisible character.",
            "Paste it as one line. Percent-encode such a character in a password.",
        )
    if _PLACEHOLDER.search(text):
        return _refused(
            "Contains a placeholder, such as [YOUR-PASSWORD] or $(DB_PASSWORD).",
            "Replace it by the value. Percent-encode a password that looks like one.",
        )
    if scheme := _SCHEME.match(text):
        return _parse_url(text[scheme.end() :], known)
    if other := _OTHER_SCHEME.match(text):
        return _refused(f"Is a {other[1].lower()} address.", f"Groundwork needs PostgreSQL: {EXAMPLE}.")
    if re.match(r"[a-z_]+\s*=", text):
        return _parse_pairs(text)
    return _refused("Is not a PostgreSQL address.", f"For example {EXAMPLE}.")


def is_printable_key(key: str) -> bool:
    """Whether a parameter's name may be shown: one that looks like a name is not a piece of a password."""
    return _KEY.match(key) is not None


def _refused(problem: str, remedy: str) -> Dsn:
    return Dsn(problems=[(problem, remedy)])


def _unwrap(text: str) -> str:
    """Remove what shells, dashboards and chat programs put around an address."""
    text = clean(text) or ""
    while True:
        before = text
        text = text.strip() if _SCHEME.match(text) else _BEFORE.sub("", text.strip(), count=1)
        if len(text) > 2 and (closing := _QUOTES.get(text[0])):
            text = text.removesuffix(";")
            text = text[1:-1] if text.endswith(closing) else text
        if text == before:
            return text


def _parse_url(rest: str, known: Collection[str]) -> Dsn:
    """Parse what follows `://`.

    In a password that was not encoded any `@` may be the last one, so each is tried. libpq's reading, the first, is
    taken if it is the only one, or if nothing in it points to an unencoded password.
    """
    readings = [reading for reading in _readings(rest) if reading is not None]
    if not readings:
        return _refused("Has a host, port or database that is not valid.", _ENCODE)
    dsn, user_info, pairs = readings[0]
    encoded = user_info is None or not re.search(r"[/@?#\s]", user_info)
    plain = encoded and all(key in known or not re.search(r"[@/?:]", value) for key, value in pairs)
    if len(readings) > 1 and not plain:
        return _refused("Can be read in more than one way.", _ENCODE)
    if user_info is not None:
        user, colon, password = user_info.partition(":")
        dsn.user = _decode(dsn, user, "user name") or None
        dsn.password = _decode(dsn, password, "password") or None if colon else None
    dsn.database = _decode(dsn, dsn.database or "", "database name") or None
    for key, value in pairs:
        dsn.add_parameter(key, _decode(dsn, value, f"value of {key}"))
    dsn.move_parameters()
    return dsn


_Reading = tuple[Dsn, str | None, list[tuple[str, str]]]


def _readings(rest: str) -> Iterator[_Reading | None]:
    if "@" not in re.split("[/?#]", rest, maxsplit=1)[0]:
        yield _reading(None, rest)
    for position, character in enumerate(rest):
        if character == "@":
            yield _reading(rest[:position], rest[position + 1 :])


def _reading(user_info: str | None, rest: str) -> _Reading | None:
    """`hosts[/database][?query]` with its hosts parsed, or None if `rest` is not of this form."""
    location, _, query = rest.partition("?")
    names, _, database = location.partition("/")
    hosts = _hosts(names) if names else []
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    named = all(equals and re.match(r"[A-Za-z_][\w.]*\Z", key, re.ASCII) for key, equals, _ in pairs)
    if hosts is None or not named or re.search(r"[/@#\s]", database):
        return None
    return Dsn(hosts=hosts, database=database), user_info, [(key, value) for key, _, value in pairs]


def _decode(dsn: Dsn, escaped: str, part: str) -> str:
    """Percent-decode. A `%` without two hexadecimal digits stands for itself."""
    text = unquote_to_bytes(_BAD_ESCAPE.sub("%25", escaped)).decode("utf-8", errors="replace")
    if "\ufffd" in text and "\ufffd" not in escaped:
        dsn.fault(f"Has a percent-escape in its {part} that is not UTF-8.", _ENCODE)
    if "\x00" in text:
        dsn.fault(f"Has a NUL character in its {part}.", "Remove %00: PostgreSQL does not accept it.")
    return text


def _hosts(text: str, *, ports: str = "", parameter: bool = False) -> list[Host] | None:
    """A comma-separated list of hosts, or None if it is none. A `parameter` may hold paths and IPv6 as they are."""
    members, defaults = [member.strip() for member in text.split(",")], ports.split(",")
    if len(defaults) == 1:
        defaults *= len(members)
    if len(defaults) != len(members):
        return None
    hosts = []
    for member, default in zip(members, defaults, strict=True):
        if parameter and (member.startswith("/") or _is_ipv6(member)):
            name, port = member, default
        elif found := _HOST.match(member):
            name = (found[1] or "").replace("%25", "%") or _decode(Dsn(), found[2] or "", "host")
            port = found[3] or default
            if not (_is_ipv6(name) if found[1] else name.startswith("/") or _HOST_NAME.match(name)):
                return None
        else:
            return None
        if "\x00" in name or (port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536)):
            return None
        # A trailing dot is valid in DNS, and matches no certificate.
        hosts.append(Host(name if "/" in name else name.rstrip("."), int(port or DEFAULT_PORT)))
    return hosts


def _is_ipv6(text: str) -> bool:
    try:
        return bool(IPv6Address(text))
    except ValueError:
        return False


def _parse_pairs(text: str) -> Dsn:
    """libpq's other form: `host=localhost dbname=app user=me password='it\\'s'`."""
    dsn, position = Dsn(), 0
    while position < len(text.rstrip()):
        pair = _PAIR.match(text, position)
        if pair is None:
            remedy = f"Put values with spaces or quotes in single quotes, with \\ before a quote; or use {EXAMPLE}."
            return _refused("Has key=value pairs that are not valid.", remedy)
        value = pair[2] if pair[2] is not None else pair[3]
        dsn.add_parameter(pair[1], re.sub(r"\\(.)", r"\1", value))
        position = pair.end()
    dsn.move_parameters()
    return dsn
