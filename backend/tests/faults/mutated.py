"""The service with something broken in it: `mutated.py serve ROOT`, and the mutant's name in FAULTS_MUTANT.

The supervisor is the real one. Its workers are this file again, which breaks the name in `breakages.py` and then is
the real worker. No source is changed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def main() -> int:
    what, root = sys.argv[1:3]
    # ROOT holds the copy of the source that is served; what lies beside this file is nobody's to import.
    sys.path[0] = root
    if what == "work":
        _break(os.environ["FAULTS_MUTANT"])
        from src.main import create_app
        from src.server import worker

        return worker.main(create_app)
    from src.config.settings import load_settings
    from src.server import supervisor

    settings = load_settings()
    return supervisor.run(
        settings,
        embedded=False,
        reload=False,
        workers=settings.workers,
        worker_command=(sys.executable, __file__, "work", root),
    )


def _break(name: str) -> None:
    import src.main  # noqa: F401 - everything that may be broken has to be there

    specification = importlib.util.spec_from_file_location(
        "breakages", Path(__file__).with_name("breakages.py")
    )
    assert specification is not None
    assert specification.loader is not None
    breakages = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(breakages)
    breakages.BREAKAGES[name]()


if __name__ == "__main__":
    raise SystemExit(main())
