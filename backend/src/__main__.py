"""`python -m src ...`"""

import sys

if __name__ == "__main__":
    try:
        from .cli.app import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
