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

    On GPUs each rank has its own and they speak by NCCL. Where a machine has fewer than ranks,
    several share one, which NCCL refuses: then, as on CPUs, they speak by gloo. Nothing is gained
    by that but a test of the GPU's arithmetic.

    A rank that waits longer than `timeout_seconds` for the others gives up, so that none outlives a
    run that has failed elsewhere.

    Raises UserError when a GPU is wanted and none is there.
    """
    alone = "RANK" not in os.environ
    where = {"rank": 0, "world_size": 1, "store": dist.HashStore()} if alone else {}
    own, backend = place(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **where)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def place(device: str) -> tuple[torch.device, str]:
    """The device of this rank and the backend it speaks by; see `distributed`."""
    if torch.device(device).type == "cpu":
        return torch.device("cpu"), "gloo"
    count = torch.cuda.device_count()
    if not count:
        raise UserError(f"device is {device}, and there is no GPU here; use cpu")
    rank, ranks = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    )
    return torch.device("cuda", rank % count), "nccl" if ranks <= count else "gloo"


def wire() -> torch.device:
    """Where a tensor must be for the ranks to exchange it."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


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
    return init_device_mesh(wire().type, (dp, pert), mesh_dim_names=NAMES)
