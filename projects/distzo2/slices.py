"""Sliced transfers (the paper's hardware-aware transfer): ranks that share a file each move an N-th
of every block over the link to the host, and give one another the rest.
"""

import hashlib
import socket
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from projects.distzo2.ranks import Ranks
from projects.zo2 import ZO2
from projects.zo2.storage import DiskStore
from shared.errors import UserError


def slice_transfers(engine: ZO2, ranks: Ranks) -> Counter[int]:
    """From now on the engine moves slices. All ranks call it.

    Returns:
        Bytes of other ranks' slices that came in, by block, counted from now on.

    Raises UserError where the blocks are not in a file, or not as they are computed with.
    """
    file, device = engine.store, engine.device
    if not isinstance(file, DiskStore):
        raise UserError(
            "sliced transfers need a file that the ranks share: storage=Path(...), in /dev/shm"
            " to keep it in memory"
        )
    if not all(codec.plain for codec in file.codecs):
        raise UserError("sliced transfers move blocks as they are: leave storage_dtype out")
    exchanged: Counter[int] = Counter()
    direct = own_gpus(engine.device, ranks)
    for sharing in ranks_by_file(file, ranks):
        # the lane's own: the losses go through another at the same time. All ranks make all groups.
        made = dist.new_group(sharing, backend="nccl" if direct else "gloo")
        if ranks.rank in sharing:
            group, place, count = made, sharing.index(ranks.rank), len(sharing)

    def complete(block: int, buffer: Tensor) -> None:
        """Every rank's slice of the block into its place in the buffer."""
        size = file.slice_nbytes(block)
        whole = buffer[: size * count]
        own = whole[place * size : (place + 1) * size]
        if direct or device.type == "cpu":
            dist.all_gather_into_tensor(whole, own.clone(), group=group)
        else:  # ranks that share a GPU, which NCCL refuses
            staged = torch.empty(whole.shape, dtype=whole.dtype)
            dist.all_gather_into_tensor(staged, own.cpu(), group=group)
            whole.copy_(staged)
        exchanged[block] += size * (count - 1)

    engine.exchange_slices(place, count, complete)
    return exchanged


def refuse_one_file(file: DiskStore, ranks: Ranks) -> None:
    """Raises UserError where ranks with replicated transfers have one file: they would find in it
    what another has already updated.
    """
    if any(len(sharing) > 1 for sharing in ranks_by_file(file, ranks)):
        raise UserError(
            "ranks with replicated transfers need a file each: put the rank in its name, or use"
            " transfer='sliced'"
        )


def ranks_by_file(file: DiskStore, ranks: Ranks) -> list[list[int]]:
    """The ranks that have one file, for each file there is."""
    own = torch.tensor([_number(socket.gethostname()), *file.identity], dtype=torch.int64)
    sharing: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(ranks.gather(own)):
        sharing.setdefault(tuple(place.tolist()), []).append(rank)
    return list(sharing.values())


def own_gpus(device: torch.device, ranks: Ranks) -> bool:
    """Whether every rank has a GPU, and no two the same one; all ranks call it.

    GPUs are told apart by what their makers number them, since each rank may see only its own.
    """
    gpu = 0
    if device.type == "cuda":
        gpu = _number(str(torch.cuda.get_device_properties(device).uuid))
    told = [int(number) for number in ranks.gather(torch.tensor(gpu))]
    return 0 not in told and len(set(told)) == len(told)


def _number(text: str) -> int:
    """A number that no other text has."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
