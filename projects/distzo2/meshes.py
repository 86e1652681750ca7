"""The grid of processes: `dp` ranks that share out the data, by `pert` (1 or 2) that share out the two perturbed forwards."""

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
def distributed(device: str = "cpu", timeout_seconds: float = 300.0) -> Iterator[None]:
    """Inside, this process is one of those that torchrun started (or the only one): gloo on CPUs, NCCL on GPUs.

    A rank that waits longer than `timeout_seconds` for the others gives up, so that none outlives a run that has failed elsewhere.
    """
    alone = "RANK" not in os.environ
    backend = "gloo" if torch.device(device).type == "cpu" else "nccl"
    store = dist.HashStore() if alone else None
    where = {"rank": 0, "world_size": 1, "store": store} if alone else {}
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_mesh(dp: int, pert: int = 1, device: str = "cpu") -> DeviceMesh:
    """A mesh of dp x pert over all ranks: (D, 1) is DDP, (1, 2) PertP, (D, 2) both, (1, 1) ZO2.

    Raises UserError when that is not the number of ranks.
    """
    world = dist.get_world_size()
    if pert not in (1, 2):
        raise UserError(f"pert is 1 or 2, the two perturbed forwards in one process or in two, not {pert}")
    if dp < 1 or dp * pert != world:
        raise UserError(f"a mesh of {dp} x {pert} needs {dp * pert} processes, and there are {world}; start it with --nproc-per-node")
    return init_device_mesh(device, (dp, pert), mesh_dim_names=NAMES)
