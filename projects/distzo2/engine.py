"""Zeroth-order fine-tuning across processes: each rank holds a ZO2 engine, and what they say to one
another in a step is scalars.

A rank of the mesh stands at (d, role). Data parallelism: the ranks of one d evaluate the d-th share
of the batch. Perturbation parallelism: of those two, one runs the forward at theta + eps z and the
other that at theta - eps z. All losses are gathered in float64 and added in the order of the shares
on every rank, so that all find the same projected gradient; z comes from the step's seed and does
not travel.

Replicas stay equal to the last bit because every rank perturbs and restores its weights by the same
roundings (+eps z, -2 eps z, +eps z) whichever forwards it runs. A rank that went +eps z, -eps z,
its partner -eps z, +eps z, would drift from it within a few steps.
"""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from projects.distzo2.meshes import NAMES, wire
from projects.zo2 import ZO2
from projects.zo2.engine import Step
from projects.zo2.storage import DiskStore
from shared.errors import UserError


class DistZO2:
    """One rank's part of a distributed run; every rank makes one, and they take all steps together.

    Args:
        engine: this rank's ZO2, with the same model, seed and options on all ranks.
        mesh: of `meshes.device_mesh`, over all ranks.
        transfer: "replicated": each rank has a host tier of its own (memory, or a file) and moves
            whole blocks. "sliced" (paper: the hardware-aware transfer): ranks that have the same
            file (in /dev/shm, or on a disk) each move an N-th of every block, and give one another
            the rest. On several nodes each node has its own.
        check_every: compare the weights of all ranks every so many steps; 0 never. An unequal rank
            stops the run.

    Raises UserError, on all ranks, when the engines differ, naming what in and on which rank.
    """

    def __init__(
        self,
        engine: ZO2,
        mesh: DeviceMesh,
        transfer: Literal["replicated", "sliced"] = "replicated",
        check_every: int = 100,
    ):
        if transfer not in ("replicated", "sliced"):
            raise UserError(f"transfer must be replicated or sliced, not '{transfer}'")
        if mesh.mesh_dim_names != NAMES or mesh.size() != dist.get_world_size():
            raise UserError("the mesh must be one of device_mesh(dp, pert), over all ranks")
        self.engine, self.mesh, self.check_every = engine, mesh, check_every
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.shares = mesh.size(0)
        # get_local_rank would be the place in a group, whose ranks are sorted
        place = mesh.get_coordinate()
        assert place is not None
        self.share, self.role = place
        self.bytes_sent = 0  # of losses and weights, by this rank
        # bytes of other ranks' slices that came in, per block
        self.exchanged: Counter[int] = Counter()
        self._weights: list[float] = []
        if mesh.size(1) == 2:
            engine.sides = (("plus",), ("minus",))[self.role]
        engine.agree = self._agree
        self._same_engines()
        if transfer == "sliced":
            self._slice()
        elif isinstance(engine.store, DiskStore):
            self._own_file(engine.store)

    # ---- what a user calls -----------------------------------------------------------------------

    def step(
        self,
        batch: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        seed: int | None = None,
        lr: float | None = None,
    ) -> Step:
        """One step on a global batch, which every rank gives whole: a list of micro-batches that
        the shares of the mesh divide.

        The losses are averaged by `weights` (rows, or supervised tokens, of each micro-batch); one
        of weight 0 counts for nothing, whatever its loss. Where there are fewer micro-batches than
        shares, the shares left over repeat the first with weight 0: all ranks must walk the blocks
        together.

        Raises:
            UserError: bad weights; the weights of the ranks' models have parted (see
                `check_every`).
        """
        weights = [1.0] * len(batch) if weights is None else list(weights)
        if (
            not batch
            or len(weights) != len(batch)
            or any(not 0 <= w < float("inf") for w in weights)
            or not any(weights)
        ):
            raise UserError(
                "a step takes micro-batches and a weight of at least 0 for each, some above 0; got"
                f" {len(batch)} and {weights}"
            )
        size = -(-len(batch) // self.shares)
        mine = slice(self.share * size, (self.share + 1) * size)
        own, own_weights = list(batch[mine]), weights[mine]
        own += [batch[0]] * (size - len(own))
        self._weights = own_weights + [0.0] * (size - len(own_weights))
        step = self.engine.step(own, seed=seed, lr=lr)
        if self.check_every and self.engine.steps % self.check_every == 0:
            self.check()
        return step

    def evaluate(self, batch: Any) -> float:
        """The loss on `batch` at the current weights; all ranks call it, with the same batch."""
        return self.engine.evaluate(batch)

    def check(self) -> None:
        """Raise UserError on all ranks when the weights of one differ in a bit from those of rank
        0.
        """
        self._compare(
            {"weights": digest(self.engine.tensors())},
            "the replicas have parted after step {steps}: ",
        )

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights to a safetensors file. All ranks call it and see the blocks pass; rank
        0 writes.
        """
        if self.rank == 0:
            self.engine.save(path, metadata)
        else:
            for _ in self.engine.tensors():
                pass
        dist.barrier()

    def unwrap(self) -> nn.Module:
        """The model, trained, on each rank; all ranks call it."""
        model = self.engine.unwrap()
        dist.barrier()
        return model

    # ---- scalars ---------------------------------------------------------------------------------

    def _agree(self, plus: list[float], minus: list[float]) -> tuple[float, float]:
        """Losses of this rank's micro-batches -> those of the whole batch, the same bits on all
        ranks.

        24 bytes a micro-batch leave each rank: two losses (0 for the one that another rank runs)
        and a weight.
        """
        size = len(self._weights)
        own = torch.tensor(
            [plus or [0.0] * size, minus or [0.0] * size, self._weights],
            dtype=torch.float64,
            device=wire(),
        )
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        self.bytes_sent += own.nbytes
        sums = [0.0, 0.0, 0.0]
        grid = self.mesh.mesh.tolist()
        for ranks in grid:  # in the order of the shares
            of_plus, of_minus, weights = found[ranks[0]][0], found[ranks[-1]][1], found[ranks[0]][2]
            for a, b, weight in zip(
                of_plus.tolist(), of_minus.tolist(), weights.tolist(), strict=True
            ):
                if weight:  # 0 times what is not finite is not 0
                    sums = [sums[0] + weight * a, sums[1] + weight * b, sums[2] + weight]
        return sums[0] / sums[2], sums[1] / sums[2]

    def _same_engines(self) -> None:
        engine = self.engine
        lr = engine.lr if isinstance(engine.lr, float | int) else None
        options: dict[str, Any] = {
            "seed": engine.seed,
            "eps": engine.eps,
            "lr": lr,
            "weight_decay": engine.weight_decay,
            "probe": engine.probe,
        }
        options |= {
            "no_decay": engine.no_decay,
            "steps": engine.steps,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        digests = {
            name: hashlib.sha256(json.dumps(value).encode()).digest()
            for name, value in options.items()
        }
        self._compare({**digests, "weights": digest(engine.tensors())}, "the ranks must be alike: ")

    def _compare(self, digests: dict[str, bytes], what: str) -> None:
        """Eight bytes a digest from each rank; UserError, on all, where one is not rank 0's."""
        own = torch.tensor(
            [list(digest[:8]) for digest in digests.values()], dtype=torch.uint8, device=wire()
        )
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        for rank, theirs in enumerate(found):
            for name, a, b in zip(digests, theirs, found[0], strict=True):
                if not torch.equal(a, b):
                    raise UserError(
                        f"{what.format(steps=self.engine.steps)}{name} of rank {rank} differs from"
                        " rank 0's"
                    )

    # ---- slices ----------------------------------------------------------------------------------

    def _own_file(self, file: DiskStore) -> None:
        """Replicas that wrote into one file would find in it what another has already updated."""
        if any(len(ranks) > 1 for ranks in self._sharing(file)):
            raise UserError(
                "ranks with replicated transfers need a file each: put the rank in its name, or use"
                " transfer='sliced'"
            )

    def _slice(self) -> None:
        file, device = self.engine.store, self.engine.device
        if not isinstance(file, DiskStore):
            raise UserError(
                "sliced transfers need a file that the ranks share: storage=Path(...), in /dev/shm"
                " to keep it in memory"
            )
        if not all(codec.plain for codec in file.codecs):
            raise UserError("sliced transfers move blocks as they are: leave storage_dtype out")
        for ranks in self._sharing(file):
            # the lane's own: the losses go through another at the same time. All ranks make all
            # groups.
            made = dist.new_group(ranks)
            if self.rank in ranks:
                group, file.part = made, (ranks.index(self.rank), len(ranks))
        place, count = file.part

        def complete(block: int, buffer: Tensor) -> None:
            """Every rank's slice of the block into its place in the buffer."""
            size = file.slice_nbytes(block)
            whole = buffer[: size * count]
            own = whole[place * size : (place + 1) * size]
            if wire().type == device.type:
                dist.all_gather_into_tensor(whole, own.clone(), group=group)
            else:  # ranks that share a GPU
                staged = torch.empty(whole.shape, dtype=whole.dtype)
                dist.all_gather_into_tensor(staged, own.cpu(), group=group)
                whole.copy_(staged)
            self.exchanged[block] += size * (count - 1)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        self.engine.exchange_through(
            complete, count * max(file.slice_nbytes(block) for block in range(len(file.codecs)))
        )

    def _sharing(self, file: DiskStore) -> list[list[int]]:
        """The ranks that have one file, for each file there is."""
        host = (
            int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:8], "big") >> 1
        )
        own = torch.tensor([host, *file.identity], dtype=torch.int64, device=wire())
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        ranks: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(found):
            ranks.setdefault(tuple(place.tolist()), []).append(rank)
        return list(ranks.values())


def shared_engine(
    make: Callable[[], nn.Module],
    path: Path,
    empty: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> ZO2:
    """An engine for sliced transfers: rank 0 writes the model's weights to `path`, and every rank
    trains in that one file.

    Args:
        make: makes the model, on rank 0.
        empty: makes one with its parameters on the meta device, on every rank; by default `make`
            once more, with no memory for parameters.
        options: of `ZO2`.
    """
    if dist.get_rank() == 0:
        model = make()
        ZO2(model, storage=path, **options).close()
    dist.barrier()
    if empty is None:
        with init_empty_weights(include_buffers=False):
            model = make()
    else:
        model = empty()
    return ZO2(model, storage=path, **options)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """SHA-256 of names, types, shapes and every bit."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.digest()
