"""The ranks of an experiment, started by `common.launch`:

    python -m projects.distzo2.experiments.worker EXPERIMENT WORLD CONFIG FOLDER

Each runs `on_rank` of that experiment's module and leaves its rows in the folder. They are forked
from this process when it has imported everything and computed nothing, so that libraries, most of a
short experiment's time, are imported once and not by every rank.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from projects.distzo2 import distributed
from shared.processes import die_with_parent

# the models of the tasks; others are of OPT's shapes, or Llama-shaped
_FAMILIES = {"fine-food": "bert", "sst2": "opt", "digits": None}


def main(name: str, world: str, config: str, folder: str) -> None:
    """Exit status 1 when a rank fails, which ends the others."""
    die_with_parent()
    torch.set_num_threads(1)
    values, count = json.loads(config), int(world)
    on_rank = importlib.import_module(f"projects.distzo2.experiments.{name}").on_rank
    family = _FAMILIES.get(values.get("task"), "opt" if values.get("model") else "llama")
    if family:  # transformers would import it in every rank
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with socket.socket() as free:  # a port that nobody has now
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(
            target=_rank, args=(rank, count, port, on_rank, values, Path(folder)), daemon=True
        )
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in running):
            sys.exit(1)  # the others are daemons
        running = [process for process in running if process.exitcode is None]


def _rank(
    rank: int,
    world: int,
    port: int,
    on_rank: Callable[..., list[dict[str, Any]]],
    values: dict[str, Any],
    folder: Path,
) -> None:
    die_with_parent()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    with distributed(values["device"], timeout_seconds=1800) as device:
        rows = on_rank({**values, "device": str(device)}, folder)
        (folder / f"{rank}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
