"""Starts the ranks of an experiment with torchrun and brings home what they measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError
from shared.paths import ROOT

# On GPUs these need one for each rank; the others are as good on ranks that share one.
TIMED = ("throughput", "link", "lanes", "cost")


def check_device(task: str, device: str, world: int) -> None:
    """Raises UserError where `task` wants GPUs on `world` ranks that this machine has not."""
    if device == "cpu":
        return
    count, wanted = torch.cuda.device_count(), world if task in TIMED else 1
    if count < wanted:
        raise UserError(
            f"distzo2/{task} wants {wanted} GPU{'s' * (wanted > 1)} and here are {count}; run it"
            " with --scale cpu"
        )


def launch(task: str, world: int, config: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Run `task` of `_ranks.py` on `world` ranks of one thread each; the rows of each rank.

    Raises UserError where GPUs are missing, and with the last line that a failed rank said.
    """
    check_device(task, config.get("device", "cpu"), world)
    with tempfile.TemporaryDirectory(
        prefix="distzo2-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
        ]
        command += ["-m", "projects.distzo2.experiments._ranks", task, json.dumps(config), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {
            name: value
            for name, value in environment.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        if done.returncode or not all(file.exists() for file in files):
            said = [
                line
                for line in done.stderr.splitlines()
                if "Error" in line and "ChildFailed" not in line
            ]
            raise UserError(
                f"distzo2/{task} on {world} ranks failed:"
                f" {said[-1] if said else done.stderr[-200:]}"
            )
        return [json.loads(file.read_text()) for file in files]
