"""Lets the tests import `sscbm_problems` (pytest's importlib mode knows no siblings)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
