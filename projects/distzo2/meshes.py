"""The grid of processes: `dp` ranks that share out the data, by `pert` (1 or 2) that share out the
two perturbed forwards.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shared.errors import UserError

NAMES = ("dp", "pert")


@contextmanager
def distributed(device: str = "cpu", timeout_seconds: float = 300.0) -> Iterator[torch.device]:
    """Inside, this process is one of those that torchrun started (or the only one); gives the
    device it is to compute on.

    What ranks say to one another (losses, digests, signals) is a few bytes of the host's, and goes
    by gloo. NCCL is for slices of blocks alone (`slices.py`): collectives of two of its groups that
    are under way at once, begun in another order on another rank, may wait for each other for good.

    Each rank has a GPU of its own, as `torchrun` numbers them, or the only one that it can see.
    Where a machine has fewer GPUs than ranks, several share one; nothing is gained by that but a
    test of the GPU's arithmetic.

    A rank that waits longer than `timeout_seconds` for the others gives up, so that none outlives a
    run that has failed elsewhere.

    Raises UserError when a GPU is wanted and none is there.
    """
    alone = "RANK" not in os.environ
    where = {"rank": 0, "world_size": 1, "store": dist.HashStore()} if alone else {}
    own = place(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds), **where)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def place(device: str) -> torch.device:
    """The device of this rank; see `distributed`."""
    if torch.device(device).type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise UserError(f"device is {device}, and there is no GPU here; use cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)


def device_mesh(dp: int, pert: int = 1) -> DeviceMesh:
    """A mesh of dp x pert over all ranks: (D, 1) is DDP, (1, 2) PertP, (D, 2) both, (1, 1) ZO2.

    Raises UserError when that is not the number of ranks.
    """
    world = dist.get_world_size()
    if pert not in (1, 2):
        raise UserError(
            f"pert is 1 or 2, the two perturbed forwards in one process or in two, not {pert}"
        )
    if dp < 1 or dp * pert != world:
        raise UserError(
            f"a mesh of {dp} x {pert} needs {dp * pert} processes, and there are {world}; start it"
            " with --nproc-per-node"
        )
    return init_device_mesh("cpu", (dp, pert), mesh_dim_names=NAMES)
