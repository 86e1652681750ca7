"""`python -m projects.sscbm`."""

import sys

from projects.sscbm.command import main

if __name__ == "__main__":
    sys.exit(main())
