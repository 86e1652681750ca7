"""`python -m projects.sam_if`."""

import sys

from projects.sam_if.command import main

if __name__ == "__main__":
    sys.exit(main())
