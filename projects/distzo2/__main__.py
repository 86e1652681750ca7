"""`torchrun ... -m projects.distzo2`."""

import sys

from projects.distzo2.command import main

if __name__ == "__main__":
    sys.exit(main())
