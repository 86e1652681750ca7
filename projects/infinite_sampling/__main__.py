"""`python -m projects.infinite_sampling`."""

import sys

from projects.infinite_sampling.command import main

if __name__ == "__main__":
    sys.exit(main())
