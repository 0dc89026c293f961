"""`python -m ebbtide`: the command line's second door."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
