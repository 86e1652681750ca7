"""`python -m projects.flashdp`."""

import sys

from projects.flashdp.command import main

if __name__ == "__main__":
    sys.exit(main())
