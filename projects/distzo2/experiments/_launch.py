"""Starts the ranks of an experiment with torchrun and brings home what they measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.paths import ROOT


def launch(task: str, world: int, config: Mapping[str, Any], timeout_seconds: float = 900) -> list[list[dict[str, Any]]]:
    """Run `task` of `_ranks.py` on `world` ranks of one thread each; the rows of each rank.

    Raises UserError with the last line that a failed rank said.
    """
    with tempfile.TemporaryDirectory(prefix="distzo2-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += ["-m", "projects.distzo2.experiments._ranks", task, json.dumps(config), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False)
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        if done.returncode or not all(file.exists() for file in files):
            said = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailed" not in line]
            raise UserError(f"distzo2/{task} on {world} ranks failed: {said[-1] if said else done.stderr[-200:]}")
        return [json.loads(file.read_text()) for file in files]
