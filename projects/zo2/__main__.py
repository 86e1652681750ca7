"""`python -m projects.zo2`."""

import sys

from projects.zo2.command import main

if __name__ == "__main__":
    sys.exit(main())
