"""One rank of an experiment, started by `common.launch`:

    python -m projects.distzo2.experiments.worker EXPERIMENT CONFIG FOLDER

It runs `on_rank` of that experiment's module and leaves the rows in the folder.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from projects.distzo2 import distributed
from shared.processes import die_with_parent


def main(name: str, config: str, folder: str) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    values = json.loads(config)
    on_rank = importlib.import_module(f"projects.distzo2.experiments.{name}").on_rank
    with distributed(values["device"], timeout_seconds=1800) as device:
        rows = on_rank({**values, "device": str(device)}, Path(folder))
        (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
