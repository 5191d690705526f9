"""From a fresh clone to a running service, with nothing but Python: `python3 backend/bootstrap.py <target>`.

The Makefile's targets end here. It finds a Python that is new enough, creates backend/.venv, installs the pinned
requirements into it, once, and becomes the program that was asked for.

It is the one file that an old Python has to read: no syntax newer than 3.6.
"""

# ruff: noqa: S603, S606, S607 - every word of the commands below is ours, or the caller's own.
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

OLDEST = (3, 11)
CANDIDATES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
BACKEND = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(BACKEND)
VENV = os.path.join(BACKEND, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "groundwork-installed.json")
UNFINISHED = os.path.join(VENV, "groundwork-installing")
ENV_FILE = os.path.join(BACKEND, ".env")
SERVICE, EMBEDDED, DEVELOPMENT = "requirements.txt", "requirements-embedded.txt", "requirements-dev.txt"
POSTGRES_15 = "/usr/lib/postgresql/15/bin/postgres"
BETTER_AUTH = os.path.join(BACKEND, "tests", "better_auth")
LOCK = os.path.join("tests", "better_auth", "package-lock.json")
OLDEST_NODE = 20

# What would point our Python elsewhere, or let it keep no bytecode: 10 s of CPU in each process of the tests.
FOREIGN = (
    "VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE",
    "PYTHONDONTWRITEBYTECODE", "__PYVENV_LAUNCHER__", "CONDA_PREFIX", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT",
    "PIP_PYTHON", "PIP_REQUIRE_HASHES", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "GNUMAKEFLAGS",
)  # fmt: skip


def main(arguments):
    target, rest = (arguments or ["help"])[0], arguments[1:]
    if target not in TARGETS:
        sys.stderr.write("usage: bootstrap.py {}\n".format(" | ".join(TARGETS)))
        return 2
    if target != "clean":
        use_new_enough_python(arguments)
    return TARGETS[target](rest) or 0


def say(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Problem(Exception):
    """Something that only the person at the keyboard can mend; the message says how."""


# Python


def use_new_enough_python(arguments):
    """Returns under a Python that will do, having become one if need be."""
    if sys.version_info >= OLDEST:
        return
    for name in CANDIDATES:
        found = shutil.which(name)
        if found and works(found):
            os.execv(found, [found, "-I", os.path.abspath(__file__), *arguments])
    raise Problem(
        "Python {}.{} or newer is needed; this is {}.{} ({}).\n"
        "  Debian, Ubuntu:  apt-get install python3.11 python3.11-venv\n"
        "  Fedora:          dnf install python3.11\n"
        "  macOS:           brew install python@3.13\n"
        "  One elsewhere:   make run PYTHON=/path/to/python3".format(
            *(OLDEST + sys.version_info[:2] + (sys.executable,))
        )
    )


def works(python):
    """Whether it runs at all (version managers leave shims that do not) and is new enough."""
    probe = f"import sys; sys.exit(sys.version_info < {OLDEST!r})"
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.call([python, "-I", "-c", probe], **silent) == 0
    except OSError:
        return False


def require_venv_module():
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = "{}.{}".format(*sys.version_info[:2])
        raise Problem(
            f"Python {version} ({sys.executable}) lacks its module {error.name}, "
            "which makes virtual environments.\n"
            f"  Debian, Ubuntu:  apt-get install python{version}-venv"
        ) from None


def environment(**more):
    """The caller's, without what would lead our Python or pip elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    # A `user = true` in somebody's pip.conf cannot work inside a virtual environment.
    kept["PIP_USER"] = "0"
    kept.update(more)
    return kept


# Installing


def install(*files):
    """Bring .venv to what `files` pin. Does nothing, quickly, when it is there already."""
    wanted = {name: fingerprint(name) for name in files}
    if up_to_date(wanted):
        return
    require_venv_module()
    with only_one():
        if up_to_date(wanted):  # the one we waited for did it
            return
        if not usable():
            say(f"Creating backend/.venv (Python {python_version()}) ...")
            run([sys.executable, "-I", "-m", "venv", "--clear", VENV], "backend/.venv could not be created.")
        stamp = read_stamp()
        with open(UNFINISHED, "w"):
            pass
        say("Installing {} into backend/.venv ...".format(", ".join(files)))
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
                   "--require-hashes"]  # fmt: skip
        for name in files:
            command += ["-r", os.path.join(BACKEND, name)]
        failed = call(command)
        # Only a kill leaves the mark: pip that fails by itself has taken back what it began.
        os.remove(UNFINISHED)
        if failed:
            raise Problem("The packages could not be installed; the lines above say why.")
        write_stamp({"python": python_version(), "files": dict(stamp.get("files", {}), **wanted)})


def usable():
    """Whether .venv was made by this Python, has pip, and no kill left it half installed."""
    probe = f"import sys, pip; sys.exit('%d.%d' % sys.version_info[:2] != '{python_version()}')"
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return not os.path.exists(UNFINISHED) and subprocess.call([PYTHON, "-I", "-c", probe], **silent) == 0
    except OSError:
        return False


def up_to_date(wanted):
    stamp = read_stamp()
    installed = stamp.get("files", {})
    return (
        os.path.exists(PYTHON)
        and not os.path.exists(UNFINISHED)
        and stamp.get("python") == python_version()
        and all(installed.get(name) == mark for name, mark in wanted.items())
    )


def fingerprint(name):
    with open(os.path.join(BACKEND, name), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def python_version():
    return "{}.{}".format(*sys.version_info[:2])


def read_stamp():
    try:
        with open(STAMP) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp):
    temporary = STAMP + ".new"
    with open(temporary, "w") as file:
        json.dump(stamp, file)
    os.replace(temporary, STAMP)


def call(command, directory=BACKEND):
    """Exit code of `command`; all that it says goes to standard error."""
    return subprocess.call(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), env=environment(), cwd=directory
    )


def run(command, complaint):
    if call(command):
        raise Problem(complaint)


@contextlib.contextmanager
def only_one():
    """Two makes at once take turns. The lock is on backend/ itself, so that it leaves no file behind."""
    descriptor = os.open(BACKEND, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another make is installing; waiting for it ...")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# Which database


def database_given():
    """Whether the operator named a database: in the environment, in backend/.env, or in a directory of secrets."""
    from_file = read_env_file()
    for source in (lower(os.environ), from_file):
        if source.get("database_url", "").strip():
            return True
    secrets = lower(os.environ).get("secrets_dir") or from_file.get("secrets_dir")
    return bool(secrets) and file_in(os.path.join(BACKEND, os.path.expanduser(secrets)), "database_url")


def file_in(directory, wanted):
    """Whether a file of that name, in capitals or not, holds something: as the service looks for its secrets."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            if name.lower() == wanted:
                with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
                    return bool(file.read().strip())
    return False


def lower(variables):
    return {name.lower(): value for name, value in variables.items()}


def read_env_file():
    """Enough of the format to see whether a value is there; the service itself reads it with python-dotenv."""
    values = {}
    with contextlib.suppress(OSError), open(ENV_FILE, encoding="utf-8", errors="replace") as file:
        for line in file:
            found = re.match(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)$", line)
            if found:
                value = re.sub(r"^#.*|\s+#.*$", "", found.group(2)).strip().strip("'\"")
                values[found.group(1).lower()] = value
    return values


def needed():
    return [SERVICE] if database_given() else [SERVICE, EMBEDDED]


# Targets


def become(*arguments, directory=BACKEND, **more):
    """Replace ourselves by .venv's Python: signals and exit codes need nobody in between."""
    os.chdir(directory)
    sys.stdout.flush()
    os.execve(PYTHON, [PYTHON, *list(arguments)], environment(**more))


def target_install(rest):
    install(*needed())
    say("Installed in backend/.venv.")


def target_run(rest):
    install(*needed())
    embedded = [] if database_given() else ["--embedded"]
    become("-m", "src", "serve", *embedded, *rest)


def command(*words, module="src", tests=False):
    def target(rest):
        install(*([SERVICE, EMBEDDED, DEVELOPMENT] if tests else needed()))
        become("-m", module, *words, *rest)

    return target


def pytest(selection, rest):
    install(SERVICE, EMBEDDED, DEVELOPMENT)
    # Most tests wait for processes and clocks, so more of them than cores run side by side.
    words = [PYTHON, "-m", "pytest", "-n", "4", "--dist", "loadgroup", "-m", selection, *rest]
    return subprocess.call(words, cwd=ROOT, env=environment(GROUNDWORK_FORBID_SKIPS="1"))


def target_test(rest):
    return pytest("not debian and not root and not slow and not node and not neon", rest)


def target_test_debian(rest):
    install_debian_packages()
    if os.geteuid() == 0:
        return pytest("(debian or root or slow) and not neon", rest)
    say("Left out: the tests that fill a disk of their own, which only root may mount (marker `root`).")
    return pytest("(debian or slow) and not root and not neon", rest)


def target_test_versions(rest):
    install_debian_packages()
    install(SERVICE, EMBEDDED, DEVELOPMENT)
    return call([PYTHON, os.path.join("tests", "versions.py"), *rest])


def target_test_issuers(rest):
    install_better_auth()
    return pytest("node and not neon", rest)


def target_test_all(rest):
    """Every part, also after one that failed or cannot be run here: what that needs is said again at the end."""
    code, missing = 0, []
    for part in (target_test, target_test_debian, target_test_versions, target_test_issuers):
        try:
            code = max(code, part(rest))
        except Problem as problem:
            missing.append(str(problem))
    if missing:
        raise Problem("\n".join(["Not everything was run.", *missing]))
    return code


def target_test_neon(rest):
    if not os.environ.get("NEON_DATABASE_URL"):
        raise Problem("NEON_DATABASE_URL is not set: NEON_DATABASE_URL='postgresql://...' make test-neon")
    return pytest("neon", rest)


def target_check(rest):
    install(SERVICE, EMBEDDED, DEVELOPMENT)
    sources = ["src", "tests", "benchmarks", "bootstrap.py"]
    judges = [os.path.join("tests", name) for name in ("test_house.py", "test_docs.py")]
    steps = [["ruff", "check", *sources], ["ruff", "format", "--check", *sources], ["mypy"]]
    steps.append(["pytest", "-q", *judges])
    failed = []
    for step in steps:
        say("== " + " ".join(step))
        if subprocess.call([PYTHON, "-m", *step], cwd=BACKEND, env=environment()):
            failed.append(step[0])
    say("Failed: " + ", ".join(failed) if failed else "All is well.")
    return 1 if failed else 0


def target_clean(rest):
    caches = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "node_modules"}
    for directory, names, _ in os.walk(ROOT):
        for name in list(names):
            if name in caches or (name == ".venv" and directory.startswith(BACKEND)):
                shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
            if name in caches or name in (".venv", ".data", ".git"):
                names.remove(name)
    say("Removed backend/.venv and the caches; data and backend/.env are untouched.")


def target_reset_database(rest):
    install(SERVICE, EMBEDDED)
    become("-m", "src.cli.reset_database", *rest)


# What other programs need


def install_better_auth():
    """Bring tests/better_auth/node_modules to what its lock file pins, hashes included. Quick when it is there."""
    needed = "A real Better Auth server needs Node.js {} or newer with npm (Debian 12's is too old); {}."
    for name in ("node", "npm"):
        if not shutil.which(name):
            raise Problem(needed.format(OLDEST_NODE, f"there is no {name} on this machine"))
    found = subprocess.check_output(["node", "--version"], universal_newlines=True).strip()
    if int(found[1:].split(".")[0]) < OLDEST_NODE:
        raise Problem(needed.format(OLDEST_NODE, f"this is {found}"))
    # Inside, so that whoever deletes the packages, npm above all, deletes the mark with them.
    mark = os.path.join(BETTER_AUTH, "node_modules", "groundwork-" + fingerprint(LOCK))
    with only_one():
        if os.path.exists(mark):
            return
        say("Installing package-lock.json into backend/tests/better_auth/node_modules ...")
        if call(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], BETTER_AUTH):
            raise Problem("npm could not install Better Auth; the lines above say why.")
        with open(mark, "w"):
            pass


def install_debian_packages():
    found = {"pgbouncer": shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin"),
             "postgresql-15": os.path.exists(POSTGRES_15),
             "faketime": glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")}  # fmt: skip
    missing = [package for package in found if not found[package]]
    if not missing:
        return
    by_hand = "apt-get install " + " ".join(missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Problem("These tests need {}. As root on Debian 12: {}".format(" and ".join(missing), by_hand))
    say("Installing {} ...".format(" and ".join(missing)))
    with starting_no_services():
        apt("update")
        if "postgresql-15" in missing:
            apt("install", "--yes", "--no-install-recommends", "postgresql-common")
        with making_no_cluster():
            if apt("install", "--yes", "--no-install-recommends", *missing):
                raise Problem("apt-get could not install them. PostgreSQL 15 belongs to Debian 12; elsewhere it "
                              "comes from apt.postgresql.org.")  # fmt: skip


def apt(*words):
    variables = environment(DEBIAN_FRONTEND="noninteractive", LC_ALL="C.UTF-8")
    return subprocess.call(["apt-get", "-qq", *list(words)], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(),
                           env=variables)  # fmt: skip


def starting_no_services():
    """Debian starts what it installs unless this file forbids it."""
    return temporary_file("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)


def making_no_cluster():
    """Debian makes a cluster, to be started at each boot, unless told not to."""
    return temporary_file(
        "/etc/postgresql-common/createcluster.d/groundwork.conf", "create_main_cluster = false\n", 0o644
    )


@contextlib.contextmanager
def temporary_file(path, text, mode):
    if os.path.exists(path) or not os.path.isdir(os.path.dirname(path)):
        yield
        return
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)
    try:
        yield
    finally:
        os.remove(path)


TARGETS = {
    "install": target_install,
    "run": target_run,
    "test": target_test,
    "test-debian": target_test_debian,
    "test-versions": target_test_versions,
    "test-issuers": target_test_issuers,
    "test-all": target_test_all,
    "test-neon": target_test_neon,
    "faults": command("run", module="tests.faults", tests=True),
    "mutants": command("mutants", module="tests.faults", tests=True),
    "fuzz": command(module="tests.fuzzing", tests=True),
    "check": target_check,
    "verify": command("verify"),
    "psql": command("psql"),
    "openapi": command("openapi"),
    "sbom": command(module="src.cli.inventory"),
    "bench": command(module="benchmarks", tests=True),
    "clean": target_clean,
    "reset-database": target_reset_database,
}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        say(str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
