"""`python -m src.server`: one worker, as the supervisor starts it."""

from ..config.loading import for_good

if __name__ == "__main__":
    with for_good():
        from ..main import create_app
        from .worker import main

    raise SystemExit(main(create_app))
