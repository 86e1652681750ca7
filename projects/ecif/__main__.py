"""`python -m projects.ecif`."""

import sys

from projects.ecif.command import main

if __name__ == "__main__":
    sys.exit(main())
