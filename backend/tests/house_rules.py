"""The house rules that a machine can keep: each a function from a source to what breaks the rule in it.

Nothing here imports the product. A finding is a line number and a sentence.
"""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

Finding = tuple[int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file by its path below backend/ (`src/models/task.py`), and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        # CPython 3.11 counts its depth wrong when a collection runs other code in the midst of this (gh-106905).
        gc.disable()
        try:
            return ast.parse(self.text, self.path)
        finally:
            gc.enable()

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def package(self) -> tuple[str, ...]:
        """The packages below `src`: `("services",)`."""
        return PurePosixPath(self.path).parts[1:-1]

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call with the dotted name of what is called."""
        for node in self.nodes:
            if isinstance(node, ast.Call):
                yield node, dotted(node.func)

    def functions(self) -> Iterator[Function]:
        for node in self.nodes:
            if isinstance(node, Function):
                yield node

    def strings(self) -> Iterator[ast.Constant]:
        """Text that is not a docstring."""
        docstrings = {id(node.value) for node in self.nodes if isinstance(node, ast.Expr)}
        for node in self.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node


Rule = Callable[[Source], Iterable[Finding]]


def dotted(node: ast.AST) -> str:
    """`asyncio.sleep` for that expression; what is computed in front of the dot is left out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def last(name: str) -> str:
    return name.rpartition(".")[2]


def inside(function: Function) -> Iterator[ast.AST]:
    """What runs when this function runs: its body without the functions defined in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))


# Imports


def imports_inside_are_relative(source: Source) -> Iterator[Finding]:
    for node in source.nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] in {"src", "backend"}:
                yield node.lineno, f"import {name} relatively"


def module_of(source: Source) -> str:
    parts = ("src", *source.package) if source.name == "__init__" else ("src", *source.package, source.name)
    return ".".join(parts)


# Errors


def no_exception_of_every_kind_is_suppressed(source: Source) -> Iterator[Finding]:
    """ruff knows `except Exception` (BLE001, S110, S112), but not this form of it."""
    for call, name in source.calls():
        if last(name) == "suppress" and any(last(dotted(kind)) in BROAD for kind in call.args):
            yield call.lineno, "every exception is suppressed"


BROAD = {"Exception", "BaseException"}


# What is never done


def no_engine_at_module_level(source: Source) -> Iterator[Finding]:
    makers = {
        "create_engine", "create_async_engine", "make_engine", "create_pool", "Database", "Database.from_settings",
        "AsyncSession", "Session", "async_sessionmaker", "sessionmaker", "PostgresServer", "FastAPI", "create_app",
    }  # fmt: skip
    waiting: list[ast.AST] = list(source.tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda):
            continue
        if isinstance(node, ast.Call) and (dotted(node.func) in makers or last(dotted(node.func)) in makers):
            yield node.lineno, f"{dotted(node.func)} is called when the module is imported"
        waiting.extend(ast.iter_child_nodes(node))


def no_base_http_middleware(source: Source) -> Iterator[Finding]:
    for node in source.nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else []
        if any(last(name) == "BaseHTTPMiddleware" for name in [*names, dotted(node)]):
            yield getattr(node, "lineno", 0), "BaseHTTPMiddleware"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "middleware"
        ):
            yield node.lineno, "@app.middleware is BaseHTTPMiddleware in disguise"


def no_select_star(source: Source) -> Iterator[Finding]:
    for text in source.strings():
        if re.search(r"(?i)\b(?:select|returning)\s+(?:distinct\s+|all\s+)?(?:\w+\.)?\*", str(text.value)):
            yield text.lineno, "a statement that selects or returns *"


def log_events_are_constant(source: Source) -> Iterator[Finding]:
    levels = {"debug", "info", "warning", "error", "critical", "exception", "log"}
    for call, name in source.calls():
        receiver, _, level = name.rpartition(".")
        if level not in levels or last(receiver) not in {"log", "_log", "logger", "_logger", "LOG"}:
            continue
        event = call.args[0] if len(call.args) == 1 else None
        if not (isinstance(event, ast.Constant) and isinstance(event.value, str)):
            yield call.lineno, "an event is one constant word; facts are named arguments"
        elif not re.fullmatch(r"[a-z0-9_.-]+", event.value):
            yield call.lineno, f"{event.value!r} is a sentence, not an event"


# The API


def yield_dependencies_end_with_the_function(source: Source) -> Iterator[Finding]:
    generators = {
        function.name
        for function in source.functions()
        if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in inside(function))
    }
    for call, name in source.calls():
        if last(name) in {"Depends", "Security"} and call.args and last(dotted(call.args[0])) in generators:
            scope = next((keyword.value for keyword in call.keywords if keyword.arg == "scope"), None)
            if not (isinstance(scope, ast.Constant) and scope.value == "function"):
                yield call.lineno, "its end would follow the answer: scope='function'"


_ROUTES = {"get", "post", "put", "patch", "delete", "head", "options", "api_route", "websocket"}
_SQL = re.compile(
    r"(?is)^\s*(?:with\s+\w+\s+as\b|select\s|insert\s+into\s|update\s+\w+\s+set\s|delete\s+from\s|create\s+\w+\s|alter\s)"
)


def endpoints_only_speak_http(source: Source) -> Iterator[Finding]:
    if source.package[:1] != ("api",):
        return
    for function in source.functions():
        routed = (
            last(dotted(mark.func)) in _ROUTES
            for mark in function.decorator_list
            if isinstance(mark, ast.Call)
        )
        if not any(routed):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Try | ast.TryStar):
                yield node.lineno, f"{function.name} catches errors: problems.py answers them"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _SQL.match(node.value):
                if ast.get_docstring(function, clean=False) != node.value:
                    yield node.lineno, f"{function.name} holds SQL"
            elif isinstance(node, ast.Call) and (
                dotted(node.func) in {"select", "insert", "update", "text"}
                or last(dotted(node.func)) in {"execute", "exec", "suppress"}
            ):
                yield node.lineno, f"{function.name} calls {dotted(node.func)}"


_PERSONAL_LABELS = {
    "user",
    "user_id",
    "email",
    "owner",
    "path",
    "url",
    "task_id",
    "request_id",
    "client",
    "token",
}


def labels_are_bounded(source: Source) -> Iterator[Finding]:
    for call, name in source.calls():
        if (
            last(name) in {"Counter", "Gauge", "Histogram", "Summary", "Info"}
            and len(call.args) + len(call.keywords) > 1
        ):
            for node in ast.walk(call):
                if isinstance(node, ast.Constant) and node.value in _PERSONAL_LABELS:
                    yield (
                        node.lineno,
                        f"a label {node.value!r} has as many values as there are people or paths",
                    )


# Tables


# Keys are named by the convention of the metadata.
_NAMED = {"CheckConstraint", "UniqueConstraint", "ExcludeConstraint", "ForeignKeyConstraint"}
_CONSTRAINT = re.compile(
    r"(?i)(?P<name>\bCONSTRAINT\s+[\w\"]+\s+)?\b(?:CHECK\s*\(|PRIMARY\s+KEY|UNIQUE(?!\s+INDEX)|FOREIGN\s+KEY|EXCLUDE\s+USING)"
)
_INLINE_REFERENCE = re.compile(r"(?i)(?P<key>FOREIGN\s+KEY\s*\([^)]*\)\s*)?\bREFERENCES\s+\w")


def constraints_are_named(source: Source) -> Iterator[Finding]:
    for call, name in source.calls():
        if last(name) in _NAMED:
            given = next((keyword.value for keyword in call.keywords if keyword.arg == "name"), None)
            if given is None:
                yield call.lineno, f"a {last(name)} without a name"
    for text in source.strings():
        statement = str(text.value)
        if re.search(r"(?i)\b(?:CREATE\s+TABLE|ALTER\s+TABLE\s+\w+\s+ADD)\b", statement):
            for match in _CONSTRAINT.finditer(statement):
                if not match["name"]:
                    yield text.lineno, f"a constraint without a name: {match[0].strip()}"
            for match in _INLINE_REFERENCE.finditer(statement):
                if not match["key"]:
                    yield text.lineno, "a reference without a name"


def migrations_set_lock_timeout(source: Source) -> Iterator[Finding]:
    """What runs migrations says in the same block, before it, how long a lock is waited for."""
    constants = {
        target.id: ast.unparse(node.value)
        for node in source.tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def says_it(step: ast.stmt) -> bool:
        said = ast.unparse(step) + "".join(
            constants.get(node.id, "") for node in ast.walk(step) if isinstance(node, ast.Name)
        )
        return "execute" in said and "lock_timeout" in said

    for node in source.nodes:
        body = getattr(node, "body", None)
        for number, step in enumerate(body if isinstance(body, list) else ()):
            call = step.value if isinstance(step, ast.Expr) else None
            runs = isinstance(call, ast.Call) and last(dotted(call.func)) == "run_migrations"
            if runs and not any(says_it(before) for before in body[:number]):
                yield step.lineno, "migrations run without lock_timeout"


# Names, sizes, words


FORBIDDEN_FILES = {
    "util", "utils", "helper", "helpers", "manager", "managers", "repository", "repositories", "schemas",
    "common", "misc",
}  # fmt: skip


def file_names_have_a_meaning(source: Source) -> Iterator[Finding]:
    for part in PurePosixPath(source.path).with_suffix("").parts:
        if FORBIDDEN_FILES & set(part.split("_")):
            yield 1, f"{part} is no name of a room"


def class_names_have_a_meaning(source: Source) -> Iterator[Finding]:
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and re.search(
            r"(?:Manager|Helper|Impl|Utils?)$|^Abstract", node.name
        ):
            yield node.lineno, f"{node.name} says nothing"


_WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}


def wall_clock_tells_moments(source: Source) -> Iterator[Finding]:
    """Whoever subtracts two readings of a clock that is set meanwhile gets no duration."""
    for call, name in source.calls():
        if name in _WALL_CLOCK:
            yield call.lineno, "asks the wall clock; durations are of time.monotonic()"


# Where the environment is read


def environment_is_read_by(allowed: frozenset[str]) -> Rule:
    def rule(source: Source) -> Iterator[Finding]:
        if source.path.removeprefix("src/") in allowed:
            return
        for node in source.nodes:
            if dotted(node) in {"os.environ", "os.getenv", "environ", "getenv"}:
                yield getattr(node, "lineno", 0), "reads the environment: settings are handed on"

    return rule


# Tests


def tests_claim_something(claiming: Iterable[str]) -> Rule:
    """`claiming` are functions of other files that assert."""

    def rule(source: Source) -> Iterator[Finding]:
        own = {function.name: function for function in source.functions()}
        asserting = set(claiming)
        grows = True
        while grows:
            found = {name for name, function in own.items() if _claims(function, asserting)}
            grows = not found <= asserting
            asserting |= found
        for name, function in own.items():
            if name.startswith("test") and name not in asserting:
                yield function.lineno, f"{name} claims nothing"

    return rule


def asserting_functions(source: Source) -> set[str]:
    return {function.name for function in source.functions() if _claims(function, set())}


def _claims(function: Function, asserting: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in {"pytest.raises", "pytest.warns", "pytest.fail"} or last(name) in asserting:
                return True
    return False


# Files that are not Python


def requirements_are_pinned(text: str) -> Iterator[str]:
    """An exact version and a SHA-256 for each, and no word about where packages come from."""
    for written in text.replace("\\\n", " ").splitlines():
        line = written.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-") or "://" in line or " @ " in line:
            yield f"{line[:60]}: says where packages come from, or includes another file"
        elif not re.match(r"^[A-Za-z0-9][\w.-]*(?:\[[\w,-]+\])?==[^\s;*]+(?:\s|$)", line):
            yield f"{line[:60]}: is not pinned to one version"
        elif not re.search(r"--hash=sha256:[0-9a-f]{64}(?:\s|$)", line) or re.search(
            r"--hash=(?!sha256:)", line
        ):
            yield f"{line[:60]}: has no SHA-256"


def pins_agree(texts: Iterable[str]) -> Iterator[str]:
    """A package has the same versions in all files, which are installed together; its markers may differ."""
    seen: dict[str, set[str]] = {}
    for text in texts:
        here: dict[str, set[str]] = {}
        for name, pin in re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?==([^\\\n]+)", text, re.MULTILINE):
            here.setdefault(name.lower().replace("_", "-"), set()).add(pin.partition(";")[0].strip())
        for name, pins in here.items():
            if seen.setdefault(name, pins) != pins:
                yield f"{name}: {' and '.join(sorted(seen[name] ^ pins))}"


_PLACES = re.compile(
    r"(?<![\w.~}/-])/(?:home|Users|root|work|workspace|builds?|mnt)/[\w.-]+|/tmp/(?!groundwork)[\w.-]+"
    r"|(?i:[a-z]:\\users\\)"
)
_REGISTRIES = re.compile(
    r"(?i)\b(?:(?:files\.|test\.)?pypi\.org|pythonhosted\.org|pypi\.python\.org|registry\.npmjs\.org|(?:[\w-]+\.)*"
    r"(?:artifactory|nexus|devpi|pkg\.dev|jfrog)[\w.-]*\.\w+|PIP_(?:EXTRA_)?INDEX_URL)\b|(?<!\w)--(?:extra-)?index-url"
)


def text_speaks_of_the_project(text: str) -> Iterator[Finding]:
    """No path of the machine it was written on, and no host that packages were fetched from."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _PLACES.search(line):
            yield number, f"{match[0]}: a path of one machine"
        if match := _REGISTRIES.search(line):
            yield number, f"{match[0]}: where packages come from is the reader's choice"
