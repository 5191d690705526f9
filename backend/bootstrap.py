"""Create backend/.venv and install the pinned requirements: `python3 backend/bootstrap.py [--dev]`.

The Makefile runs it in front of every target that needs packages. It needs nothing but Python, and returns quickly when
everything is installed. An old Python has to be able to read it: no syntax newer than 3.6.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys

OLDEST = (3, 11)
CANDIDATES = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
BACKEND = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(BACKEND, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "groundwork-installed.json")
SERVICE, EMBEDDED, DEVELOPMENT = "requirements.txt", "requirements-embedded.txt", "requirements-dev.txt"

# Variables that would point Python or pip to other packages or places.
REMOVED_VARIABLES = (
    "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONDONTWRITEBYTECODE",
    "__PYVENV_LAUNCHER__", "CONDA_PREFIX", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_REQUIRE_HASHES",
)  # fmt: skip

WINDOWS = """\
Groundwork runs on Linux and macOS. On Windows use WSL:
  wsl --install
and there, in a clone inside WSL: make run"""

TOO_OLD = """\
Python {}.{} or newer is needed; this is {}.{} ({}).
  Debian, Ubuntu:  apt-get install python3.11 python3.11-venv
  Fedora:          dnf install python3.11
  macOS:           brew install python@3.13
  Another path:    make run PYTHON=/path/to/python3"""

NO_EMBEDDED = """\
There is no private PostgreSQL for this system: its packages need glibc, and this system has {}. Set DATABASE_URL to a
PostgreSQL of 15 to 18, for example DATABASE_URL='postgresql://USER:PASSWORD@HOST/DATABASE' make run"""

INTEL_MAC = """
Some packages have no wheels for Intel Macs and are compiled: xcode-select --install, brew install rust openssl@3.
Or run the service in a Linux container or virtual machine."""


class Problem(Exception):
    """An obstacle that the user has to remove; the message says how."""


def main(arguments):
    """Exit code 0, or 2 for wrong arguments."""
    if arguments not in ([], ["--dev"]):
        say("usage: bootstrap.py [--dev]")
        return 2
    if os.name == "nt":
        raise Problem(WINDOWS)
    use_new_enough_python(arguments)
    install(*requirements(development=bool(arguments)))
    return 0


def say(text):
    """Print a line on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# Python


def use_new_enough_python(arguments):
    """Return under a Python that is new enough, after replacing this process by one if necessary."""
    if sys.version_info >= OLDEST:
        return
    for name in CANDIDATES:
        found = shutil.which(name)
        if found and is_new_enough(found):
            os.execv(found, [found, "-I", os.path.abspath(__file__), *arguments])  # noqa: S606
    raise Problem(TOO_OLD.format(*(OLDEST + sys.version_info[:2] + (sys.executable,))))


def is_new_enough(python):
    """False also for what cannot be run: version managers leave such shims."""
    probe = f"import sys; sys.exit(sys.version_info < {OLDEST!r})"
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.call([python, "-I", "-c", probe], **silent) == 0  # noqa: S603
    except OSError:
        return False


def require_venv_module():
    """Raise Problem where Debian split `venv` off from Python."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = "{}.{}".format(*sys.version_info[:2])
        raise Problem(
            f"Python {version} ({sys.executable}) lacks its module {error.name}, which makes virtual environments.\n"
            f"  Debian, Ubuntu:  apt-get install python{version}-venv"
        ) from None


# Installing


def requirements(development):
    """The files to install here. The embedded PostgreSQL is left out where it has no wheel."""
    libc = platform.libc_ver()[0] or "musl"
    if sys.platform != "linux" or libc == "glibc":
        return [SERVICE, EMBEDDED, DEVELOPMENT] if development else [SERVICE, EMBEDDED]
    if development:
        raise Problem(
            f"The tests need a private PostgreSQL, whose packages need glibc; this system has {libc}."
        )
    if not os.environ.get("DATABASE_URL"):
        say(NO_EMBEDDED.format(libc))
    return [SERVICE]


def install(*names):
    """Bring .venv to what the files pin.

    The stamp lists what is installed. It is absent while pip runs, so without a stamp .venv is created anew.
    """
    wanted = {name: digest(name) for name in names}
    if wanted.items() <= read_stamp().items():
        return
    require_venv_module()
    with lock():
        stamp = read_stamp()
        if wanted.items() <= stamp.items():  # Another process installed it while this one waited.
            return
        if not stamp:
            say("Creating backend/.venv (Python {}.{}) ...".format(*sys.version_info[:2]))
            if call([sys.executable, "-I", "-m", "venv", "--clear", VENV]):
                raise Problem("backend/.venv could not be created.")
            make_importable()
        say("Installing {} into backend/.venv ...".format(", ".join(names)))
        remove(STAMP)
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--require-hashes", *("--requirement=" + os.path.join(BACKEND, name) for name in names)]
        failed = call(command)
        # pip undoes what it began when it fails, so the former stamp is true again.
        write_stamp(stamp if failed else dict(stamp, **wanted))
        if failed:
            intel_mac = (platform.system(), platform.machine()) == ("Darwin", "x86_64")
            hint = INTEL_MAC if intel_mac else ""
            raise Problem("The packages could not be installed; the lines above say why." + hint)


def make_importable():
    """Let .venv's Python import `src` from any directory, as an editable installation would."""
    query = [PYTHON, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.check_output(query, universal_newlines=True).strip()  # noqa: S603
    with open(os.path.join(packages, "groundwork.pth"), "w", encoding="utf-8") as file:
        file.write(os.path.relpath(BACKEND, packages) + "\n")  # Relative, so ASCII: it is read in any locale.


def digest(name):
    """The SHA-256 of a file of requirements."""
    with open(os.path.join(BACKEND, name), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_stamp():
    """What .venv holds; empty when there is none, or when another Python or another place made it."""
    try:
        with open(STAMP, encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if os.path.exists(PYTHON) and maker().items() <= stamp.items() else {}


def write_stamp(stamp):
    """Replace the stamp in one step."""
    with open(STAMP + ".new", "w", encoding="utf-8") as file:
        json.dump(dict(stamp, **maker()), file)
    os.replace(STAMP + ".new", STAMP)


def maker():
    """What .venv depends on beside the requirements."""
    return {"python": "{}.{}".format(*sys.version_info[:2]), "place": BACKEND}


def call(command):
    """The exit code of `command`, whose output goes to standard error."""
    environment = {name: value for name, value in os.environ.items() if name not in REMOVED_VARIABLES}
    # `user = true` in a pip.conf cannot work inside a virtual environment.
    environment["PIP_USER"] = "0"
    return subprocess.call(  # noqa: S603
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), env=environment, cwd=BACKEND
    )


def remove(path):
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


@contextlib.contextmanager
def lock():
    """One installation at a time. The lock is on backend/ itself, which leaves no file behind."""
    import fcntl  # Windows has none.

    descriptor = os.open(BACKEND, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another process is installing; waiting for it ...")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        say(str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
