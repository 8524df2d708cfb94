"""`python -m vidaccel`."""

import sys

from vidaccel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
