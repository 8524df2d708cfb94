"""`python -m vidaccel`."""

import sys

from vidaccel.cli import main

if __name__ == "__main__":
    sys.exit(main())
