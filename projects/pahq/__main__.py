"""`python -m projects.pahq`."""

import sys

from projects.pahq.command import main

if __name__ == "__main__":
    sys.exit(main())
