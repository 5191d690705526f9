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


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    """From the root: `src.services.database`, `asyncpg`."""
    relative: bool


def imports(source: Source) -> Iterator[Import]:
    """Every import, also those inside functions and under TYPE_CHECKING."""
    here = ("src", *source.package)
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(node.lineno, node.module or "", False)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1]
            if node.module:
                yield Import(node.lineno, ".".join((*base, node.module)), True)
            else:
                for alias in node.names:
                    yield Import(node.lineno, ".".join((*base, alias.name)), True)


FLOORS = ("errors", "config", "models", "migrations", "services", "api", "main", "top")
"""From the ground up. `top` is what a person or the operating system starts."""
_GROUND = {"errors", "loading", "version"}
_FOREIGN = {
    # What a floor must not know of. Below `api` nobody has heard of HTTP; only `services` talk to the database.
    "errors": {
        "fastapi",
        "starlette",
        "uvicorn",
        "asyncpg",
        "sqlalchemy",
        "sqlmodel",
        "alembic",
        "pydantic",
        "structlog",
    },
    "config": {"fastapi", "starlette", "uvicorn", "asyncpg", "sqlalchemy", "sqlmodel", "alembic", "typer"},
    "models": {"fastapi", "starlette", "uvicorn", "alembic", "typer", "structlog"},
    "migrations": {"fastapi", "starlette", "uvicorn", "typer"},
    "services": {"fastapi", "starlette", "uvicorn", "typer"},
    "api": {"asyncpg", "sqlalchemy", "alembic", "typer", "uvicorn"},
    "main": {"asyncpg", "sqlalchemy", "sqlmodel", "alembic", "typer"},
}


def floor(module: str) -> str:
    part = module.split(".")[1] if "." in module else "top"
    if part in _GROUND:
        return "errors"
    return part if part in FLOORS else "top"


def imports_go_one_way(source: Source) -> Iterator[Finding]:
    mine = floor(".".join(("src", *source.package, source.name)))
    for found in imports(source):
        if found.module.split(".")[0] == "src":
            theirs = floor(found.module)
            if FLOORS.index(theirs) > FLOORS.index(mine):
                yield found.line, f"{mine} imports {found.module}, which lies above it"
        elif found.module.split(".")[0] in _FOREIGN.get(mine, ()):
            yield found.line, f"{mine} must not know of {found.module}"


def imports_inside_are_relative(source: Source) -> Iterator[Finding]:
    for found in imports(source):
        if not found.relative and found.module.split(".")[0] in {"src", "backend"}:
            yield found.line, f"import {found.module} relatively"


_WORDS_OF_API = {
    "application", "bodies", "conditions", "contract", "cors", "cursors", "deps", "examples", "fast_path",
    "headers", "middleware", "pages", "problems", "transfers", "written",
}  # fmt: skip


def routers_never_import_each_other(source: Source) -> Iterator[Finding]:
    if source.package[:1] != ("api",):
        return
    for found in imports(source):
        parts = found.module.split(".")
        if parts[:2] == ["src", "api"] and len(parts) > 2 and parts[2] not in _WORDS_OF_API:
            yield found.line, f"a part of the API imports the router {parts[2]}"


NOUNS = ("users", "tasks")
_OF_NOUNS = {"database", "idempotency", "identity", "metrics", "ownership", "paging", "statements"}


def nouns_use_no_sibling(source: Source) -> Iterator[Finding]:
    if source.package != ("services",) or source.name not in NOUNS:
        return
    for found in imports(source):
        parts = found.module.split(".")
        own = len(parts) > 2 and parts[2].startswith(f"{source.name.removesuffix('s')}_")
        known = len(parts) > 2 and (own or parts[2] in _OF_NOUNS)
        if parts[:2] == ["src", "services"] and not known:
            yield found.line, f"a noun's service imports {found.module}"
        elif parts[:2] == ["src", "config"]:
            yield found.line, "a noun's service reads no settings"


def circles(sources: Iterable[Source]) -> list[str]:
    """Modules that need each other while they are being imported."""
    known = {module_of(source): source for source in sources}
    needs = {module: _needed_at_import(source, known) for module, source in known.items()}
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in sorted(needs[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(known):
        visit(module, ())
    return found


def module_of(source: Source) -> str:
    parts = ("src", *source.package) if source.name == "__init__" else ("src", *source.package, source.name)
    return ".".join(parts)


def _needed_at_import(source: Source, known: dict[str, Source]) -> set[str]:
    body = [node for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    top = Source(source.path, "\n".join(ast.unparse(node) for node in body))
    named = {found.module for found in imports(top)}
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(("src", *source.package)[: len(source.package) + 2 - node.level])
            prefix = f"{base}.{node.module}" if node.module else base
            named |= {f"{prefix}.{alias.name}" for alias in node.names}
    # A package's own __init__ names its parts; the parts do not need it back.
    return {module for module in named if module in known and module != module_of(source)}


# Errors


def no_error_is_swallowed(source: Source) -> Iterator[Finding]:
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "a bare except"
            elif _is_broad(node.type) and all(_does_nothing(step) for step in node.body):
                yield node.lineno, "every exception is caught and forgotten"
        elif (
            isinstance(node, ast.Call)
            and last(dotted(node.func)) == "suppress"
            and any(_is_broad(kind) for kind in node.args)
        ):
            yield node.lineno, "every exception is suppressed"


def _is_broad(kind: ast.AST) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(dotted(each) in {"Exception", "BaseException"} for each in kinds)


def _does_nothing(step: ast.stmt) -> bool:
    return isinstance(step, ast.Pass | ast.Continue | ast.Break) or (
        isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
    )


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


_BLOCKING = re.compile(
    r"^(?:time\.sleep|open|input|os\.(?:system|popen|wait\w*|fsync|replace|rename|remove|listdir)"
    r"|subprocess\.\w+|requests\.\w+|httpx\.(?:get|post|put|patch|delete|request|stream|Client)"
    r"|urllib\.request\.\w+|urlopen|shutil\.\w+|socket\.(?:create_connection|getaddrinfo|gethostbyname)"
    r"|create_engine|psycopg2?\.connect)$"
)
_BLOCKING_METHODS = {"read_text", "write_text", "read_bytes", "write_bytes"}


def nothing_blocks_in_async_functions(source: Source) -> Iterator[Finding]:
    for function in source.functions():
        if not isinstance(function, ast.AsyncFunctionDef):
            continue
        for node in inside(function):
            if isinstance(node, ast.Call):
                name = dotted(node.func)
                if _BLOCKING.match(name) or last(name) in _BLOCKING_METHODS:
                    yield node.lineno, f"{name} blocks the event loop in {function.name}"


def no_print(source: Source) -> Iterator[Finding]:
    """Before there is a log, the last words of a start that failed go to standard error, and nothing else does."""
    for call, name in source.calls():
        if name == "print":
            where = next((keyword.value for keyword in call.keywords if keyword.arg == "file"), None)
            if where is None or dotted(where) != "sys.stderr":
                yield call.lineno, "print"


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


def depends_only_in_deps(source: Source) -> Iterator[Finding]:
    if source.path != "src/api/deps.py":
        for call, name in source.calls():
            if last(name) in {"Depends", "Security"}:
                yield call.lineno, f"{last(name)} belongs into api/deps.py"


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


_UNFINISHED = re.compile(
    "|".join(rf"\b{a}{b}\b" for a, b in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("HA", "CK")))
)


def unfinished_work_is_not_kept(source: Source) -> Iterator[Finding]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if _UNFINISHED.search(line):
            yield number, "work that is not finished"


_WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}


def wall_clock_tells_moments(source: Source) -> Iterator[Finding]:
    """Whoever subtracts two readings of a clock that is set meanwhile gets no duration."""
    for call, name in source.calls():
        if name in _WALL_CLOCK:
            yield call.lineno, "asks the wall clock; durations are of time.monotonic()"


_LONG_FUNCTION_LINES = 30


def docstrings_promise(source: Source) -> Iterator[Finding]:
    """A name says it all for what is short. A module, and what is public and long, has to promise something."""
    defines = any(isinstance(node, Function | ast.ClassDef) for node in source.tree.body)
    if defines and not ast.get_docstring(source.tree) and not _one_noun(source):
        yield 1, "a module that does not say what it is for"
    for node in source.tree.body:
        yield from _missing_promises(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                yield from _missing_promises(member)


def _one_noun(source: Source) -> bool:
    return source.package == ("models",)


def _missing_promises(node: ast.stmt) -> Iterator[Finding]:
    if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_") or ast.get_docstring(node):
        return
    if isinstance(node, ast.ClassDef):
        methods = [member for member in node.body if isinstance(member, Function)]
        if sum(not method.name.startswith("_") for method in methods) >= 3:
            yield node.lineno, f"class {node.name} has many methods and no promise"
    elif (node.end_lineno or 0) - node.body[0].lineno + 1 > _LONG_FUNCTION_LINES:
        yield node.lineno, f"{node.name} is long and has no promise"


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


def no_test_is_skipped(source: Source) -> Iterator[Finding]:
    words = {"skip", "skipif", "skipIf", "skipUnless", "xfail", "importorskip", "expectedFailure", "SkipTest"}
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in words:
            if last(dotted(node.value)) in {"pytest", "mark", "unittest"}:
                yield node.lineno, f"{dotted(node)}: a skipped test proves nothing"
        elif isinstance(node, ast.ImportFrom) and node.module in {"pytest", "unittest"}:
            yield from ((node.lineno, "imports what skips tests") for a in node.names if a.name in words)


def test_names_are_unique(source: Source) -> Iterator[Finding]:
    for scope in [source.tree, *(node for node in source.nodes if isinstance(node, ast.ClassDef))]:
        seen: set[str] = set()
        for node in scope.body:
            if isinstance(node, Function | ast.ClassDef):
                if node.name in seen:
                    yield node.lineno, f"{node.name} hides another of that name"
                seen.add(node.name)


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
