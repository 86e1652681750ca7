"""Where things lie. Everything is found from the repository root, so commands work from any
folder.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = ROOT / "projects"
REFERENCE = ROOT / "results" / "reference"  # finished runs that the repository keeps, by scale
SCALES = ("smoke", "cpu", "gpu", "paper")


def results_dir() -> Path:
    """`results/`, or the folder that REPRO_RESULTS of the environment names; empty is not set."""
    return Path(os.environ.get("REPRO_RESULTS") or ROOT / "results")


def cache_dir() -> Path:
    """`data/cache/`, or the folder that REPRO_CACHE of the environment names; empty is not set."""
    return Path(os.environ.get("REPRO_CACHE") or ROOT / "data" / "cache")
