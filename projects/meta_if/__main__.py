"""`python -m projects.meta_if`."""

import sys

from projects.meta_if.command import main

if __name__ == "__main__":
    sys.exit(main())
