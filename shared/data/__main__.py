import sys

from shared.data.cli import main

sys.exit(main())
