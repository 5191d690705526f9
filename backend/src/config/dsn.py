"""The grammar of what people paste as a database address: text in, parts out, no opinion about them.

Understood are URLs as Neon, Heroku, Docker guides and SQLAlchemy tutorials print them, with quotes, `psql ...` or
`DATABASE_URL=...` around them, and libpq's `key=value` form. Problems come back as sentences that never quote
the text, because any piece of a string that could not be understood may be a piece of the password.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from urllib.parse import unquote_to_bytes

DEFAULT_PORT = 5432

# postgresql+asyncpg:// and its like name a Python driver; the address behind it is the same.
_SCHEME = re.compile(r"(?i)\s*(postgres(?:ql)?)(?:\+[a-z0-9_]+)?://")
_OTHER_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]{1,24})://")
_AROUND = re.compile(
    r"(?:\$\s+)?(?:export\s+)?(?:[A-Z][A-Z0-9_]*URL\s*=\s*)?(?:psql\s+(?:(?:-d|--dbname)[\s=]+)?)?"
)
_QUOTES = {"'": "'", '"': '"', "`": "`", "<": ">", "‘": "’", "“": "”"}
_HOST_NAME = re.compile(r"[\w.-]+\Z")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,40}\Z")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


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
class Pasted:
    """The parts of a connection string, decoded. What is absent is None or empty. Its repr is not shown to anybody."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    hosts: list[Host] = field(default_factory=list)
    database: str | None = None
    parameters: dict[str, str] = field(default_factory=dict, repr=False)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def fault(self, problem: str, remedy: str) -> None:
        if (problem, remedy) not in self.problems:
            self.problems.append((problem, remedy))


EXAMPLE = "postgresql://user:password@host:5432/database"
_ENCODE = (
    "Write the password percent-encoded (@ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25), for example "
    f"{EXAMPLE}."
)


def read(text: str, known: Collection[str]) -> Pasted:
    """Take a pasted string apart. `problems` says what could not be understood; nothing is raised.

    `known` are the parameters that make sense; they help to tell a parameter from a piece of a raw password.
    """
    text = _unwrap(text)
    if not text:
        return _refused("it is empty.", f"Give an address such as {EXAMPLE}.")
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        return _refused(
            "it contains a line break or another control character.",
            "Paste it as one line; such a character in a password is percent-encoded.",
        )
    if scheme := _SCHEME.match(text):
        return _read_url(text[scheme.end() :], known)
    if other := _OTHER_SCHEME.match(text):
        scheme_name = other[1].lower()
        if scheme_name in {
            "mysql",
            "mariadb",
            "sqlite",
            "mongodb",
            "redis",
            "http",
            "https",
            "mssql",
            "oracle",
        }:
            return _refused(f"it is a {scheme_name} address.", f"Groundwork speaks to PostgreSQL: {EXAMPLE}.")
    if re.match(r"\s*[a-z_]+\s*=", text):
        return _read_pairs(text)
    return _refused("it is not a PostgreSQL address.", f"It has to look like {EXAMPLE}.")


def _refused(problem: str, remedy: str) -> Pasted:
    pasted = Pasted()
    pasted.fault(problem, remedy)
    return pasted


def _unwrap(text: str) -> str:
    """Take off what shells, dashboards and chat programs leave around an address."""
    text = text.strip().removeprefix("\ufeff")
    while True:
        before = text
        text = _AROUND.sub("", text.strip(), count=1) if not _SCHEME.match(text) else text.strip()
        if len(text) > 2 and text[0] in _QUOTES:
            closing = _QUOTES[text[0]]
            text = text[:-1] if text.endswith(closing + ";") else text
            text = text[1:-1] if text.endswith(closing) else text
        if text == before:
            return text.removeprefix("jdbc:") if text.startswith("jdbc:postgres") else text


# --- URLs ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reading:
    """One way of reading a URL: where user and password end, and what follows."""

    userinfo: str | None
    hosts: str
    database: str
    query: str


def _read_url(rest: str, known: Collection[str]) -> Pasted:
    """`rest` is what follows `://`.

    A password pasted raw may hold any of `@ / ? # :`. Every `@` could end it, so each is tried: what follows has
    to be a host list, then perhaps a database, then perhaps parameters. The standard reading wins when it works;
    one single reading that works is as good; several mean that nobody can know, and that is said.
    """
    readings = list(_readings(rest))
    if not readings:
        return _refused("its host, port or database cannot be told apart from the rest.", _ENCODE)
    standard = readings[0]
    if len(readings) > 1 and not _plain(standard, known):
        return _refused("it can be read in more than one way.", _ENCODE)
    return _decode(standard)


def _readings(rest: str) -> list[_Reading]:
    found = []
    authority = re.match(r"[^/?#]*", rest)
    if authority is not None and "@" not in authority[0]:
        reading = _tail(None, rest)
        if reading is not None:
            found.append(reading)
    for position, character in enumerate(rest):
        if character == "@":
            reading = _tail(rest[:position], rest[position + 1 :])
            if reading is not None:
                found.append(reading)
    return found


def _tail(userinfo: str | None, rest: str) -> _Reading | None:
    """What follows the user: `hosts[/database][?query]`, or None when it is not that."""
    location, _, query = rest.partition("?")
    hosts, _, database = location.partition("/")
    if re.search(r"[/@#\s]", database) or (hosts and _hosts(hosts, escaped=True) is None):
        return None
    if query and not all(re.match(r"[A-Za-z_][A-Za-z0-9_.]*=", pair) for pair in query.split("&") if pair):
        return None
    return _Reading(userinfo, hosts, database, query)


def _plain(reading: _Reading, known: Collection[str]) -> bool:
    """Whether this reading follows the standard so closely that another one is not worth considering."""
    if reading.userinfo is not None and re.search(r"[/@?#\s]", reading.userinfo):
        return False
    pairs = (pair.partition("=") for pair in reading.query.split("&"))
    return all(key in known or not re.search(r"[@/?:]", value) for key, _, value in pairs)


def _decode(reading: _Reading) -> Pasted:
    pasted = Pasted()
    if reading.userinfo is not None:
        user, colon, password = reading.userinfo.partition(":")
        pasted.user = _text(pasted, user, "user name") or None
        if colon:
            pasted.password = _text(pasted, password, "password") or None
    pasted.hosts = _hosts(reading.hosts, escaped=True) or []
    pasted.database = _text(pasted, reading.database, "database name") or None
    for pair in reading.query.split("&"):
        if pair:
            key, _, value = pair.partition("=")
            _parameter(pasted, key, _text(pasted, value, f"value of {key}"))
    _absorb(pasted)
    return pasted


def _text(pasted: Pasted, escaped: str, what: str) -> str:
    """Percent-decode. A `%` that is no escape stands for itself; bytes that are no text are refused."""
    decoded = unquote_to_bytes(_BAD_ESCAPE.sub("%25", escaped) if "%" in escaped else escaped)
    text = decoded.decode("utf-8", errors="replace")
    if "\ufffd" in text and "\ufffd" not in escaped:
        pasted.fault(f"its {what} has a percent-escape that is not UTF-8.", _ENCODE)
    if "\x00" in text:
        pasted.fault(
            f"its {what} contains a NUL character, which PostgreSQL never accepts.", "Leave out %00."
        )
    return text


def _hosts(text: str, *, escaped: bool, ports: str = "") -> list[Host] | None:
    """A comma-separated host list, or None when one of its members is neither a host nor a socket directory."""
    hosts = []
    members = [member.strip() for member in text.split(",")]
    port_list = ports.split(",") if ports else []
    if len(port_list) not in {0, 1, len(members)}:
        return None
    for index, member in enumerate(members):
        default = port_list[index] if len(port_list) > 1 else (port_list[0] if port_list else "")
        if bracketed := re.match(r"\[([0-9A-Fa-f:.]+(?:%[\w%.-]+)?)\](?::(\d*))?\Z", member):
            name, port = bracketed[1].replace("%25", "%"), bracketed[2] or default
            if not _is_ipv6(name):
                return None
        elif not escaped and (member.startswith("/") or _is_ipv6(member)):
            name, port = member, default
        else:
            name, colon, port = member.partition(":")
            if escaped and "%" in name:
                name = unquote_to_bytes(name).decode("utf-8", errors="replace")
            if colon and port and not re.fullmatch(r"[0-9]{1,5}", port):
                return None
            port = port or default
            if not (name.startswith("/") and "\x00" not in name) and not _HOST_NAME.match(name):
                return None
        if port and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
            return None
        # A final dot is right in DNS, and in no certificate.
        name = name.rstrip(".") if "/" not in name else name
        hosts.append(Host(name, int(port) if port else DEFAULT_PORT))
    return hosts


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


# --- parameters, and key=value strings -----------------------------------------------------------------------------


def _parameter(pasted: Pasted, key: str, value: str) -> None:
    # SQLAlchemy spells a host list as host=a&host=b.
    if key == "host" and pasted.parameters.get("host"):
        value = f"{pasted.parameters['host']},{value}"
    elif pasted.parameters.get(key, value) != value:
        pasted.fault(f"the parameter {key} is given twice, with different values.", "Keep one of them.")
    pasted.parameters[key] = value


def _absorb(pasted: Pasted) -> None:
    """Move user, password, host, port and database out of the parameters, where libpq also accepts them."""
    take = pasted.parameters.pop
    pasted.user = take("user", "") or pasted.user
    pasted.password = take("password", "") or pasted.password
    pasted.database = take("dbname", "") or take("database", "") or pasted.database
    host, port = take("host", ""), take("port", "")
    if host:
        # SQLAlchemy's and asyncpg's host=a:1 is read too, beside libpq's host=a&port=1.
        hosts = _hosts(host, escaped=False, ports=port)
        if hosts is None:
            pasted.fault(
                "its host or port parameter is not a host list with ports from 1 to 65535.", f"See {EXAMPLE}."
            )
        pasted.hosts = hosts or []
    elif port and pasted.hosts:
        names = ",".join(f"[{host.name}]" if ":" in host.name else host.name for host in pasted.hosts)
        hosts = _hosts(names, escaped=False, ports=port)
        if hosts is None:
            pasted.fault(
                "its port parameter is not a number from 1 to 65535 for each host.", f"See {EXAMPLE}."
            )
        pasted.hosts = hosts or pasted.hosts


_PAIR = re.compile(r"\s*([A-Za-z_]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|\Z)")


def _read_pairs(text: str) -> Pasted:
    """libpq's other form: `host=localhost dbname=app user=me password='it''s'`."""
    pasted = Pasted()
    position = 0
    while position < len(text.rstrip()):
        pair = _PAIR.match(text, position)
        if pair is None:
            return _refused(
                "its key=value pairs cannot be told apart.",
                "Put values with spaces or quotes in single quotes, with \\ before a quote; or use "
                f"{EXAMPLE}.",
            )
        value = pair[2] if pair[2] is not None else pair[3]
        _parameter(pasted, pair[1], re.sub(r"\\(.)", r"\1", value))
        position = pair.end()
    _absorb(pasted)
    return pasted


def is_printable_key(key: str) -> bool:
    """Whether a parameter's name can be shown: a name that looks like one is not a piece of a password."""
    return _KEY.match(key) is not None
