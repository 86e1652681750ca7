"""`python -m projects.idp`."""

import sys

from projects.idp.command import main

if __name__ == "__main__":
    sys.exit(main())
