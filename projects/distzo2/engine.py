"""Zeroth-order fine-tuning across processes: each rank holds a ZO2 engine, and what they say to one
another in a step is scalars (`ranks.py`); z comes from the step's seed and does not travel.

Replicas stay equal to the last bit because every rank perturbs and restores its weights by the same
roundings (+eps z, -2 eps z, +eps z) whichever forwards it runs. A rank that went +eps z, -eps z,
its partner -eps z, +eps z, would drift from it within a few steps.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import nn

from projects.distzo2.ranks import Ranks
from projects.distzo2.slices import refuse_one_file, slice_transfers
from projects.zo2 import ZO2, Step
from projects.zo2.digests import digest
from projects.zo2.storage import DiskStore
from shared.errors import UserError


class DistZO2:
    """One rank's part of a distributed run; every rank makes one, and they take all steps together.

    Args:
        engine: this rank's `ZO2(model, forwards=Ranks(mesh), ...)`, with the same model, seed and
            options on all ranks.
        transfer: "replicated": each rank has a host tier of its own (memory, or a file) and moves
            whole blocks. "sliced": ranks that have the same file (in /dev/shm, or on a disk) each
            move an N-th of every block. On several nodes each node has its own.
        check_every: compare the weights of all ranks every so many steps; 0 never. An unequal rank
            stops the run.

    Attributes:
        exchanged: bytes of other ranks' slices that came in, by block.

    Raises UserError, on all ranks, when the engines differ, naming what in and on which rank.
    """

    def __init__(
        self,
        engine: ZO2,
        transfer: Literal["replicated", "sliced"] = "replicated",
        check_every: int = 100,
    ):
        if transfer not in ("replicated", "sliced"):
            raise UserError(f"transfer must be replicated or sliced, not '{transfer}'")
        if not isinstance(engine.forwards, Ranks):
            raise UserError(
                "the engine must share its forwards out: ZO2(..., forwards=Ranks(mesh))"
            )
        self.engine, self.ranks, self.check_every = engine, engine.forwards, check_every
        self._same_engines()
        self.exchanged: Counter[int] = Counter()
        if transfer == "sliced":
            self.exchanged = slice_transfers(engine, self.ranks)
        elif isinstance(engine.store, DiskStore):
            refuse_one_file(engine.store, self.ranks)

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
        of weight 0 counts for nothing, whatever its loss.

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
        step = self.engine.step(self.ranks.take(batch, weights), seed=seed, lr=lr)
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
        self.ranks.must_agree(
            {"weights": digest(self.engine.tensors())},
            f"the replicas have parted after step {self.engine.steps}",
        )

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights to a safetensors file. All ranks call it and see the blocks pass; rank
        0 writes.
        """
        if self.ranks.rank == 0:
            self.engine.save(path, metadata)
        else:
            for _ in self.engine.finite_tensors():  # refused on all ranks alike
                pass
        dist.barrier()

    def unwrap(self) -> nn.Module:
        """The model, trained, on each rank; all ranks call it."""
        model = self.engine.unwrap()
        dist.barrier()
        return model

    def _same_engines(self) -> None:
        chosen = self.engine.options
        alike: dict[str, Any] = {
            "seed": chosen.seed,
            "eps": chosen.eps,
            "lr": chosen.lr if isinstance(chosen.lr, float | int) else None,
            "weight_decay": chosen.weight_decay,
            "probe": chosen.probe,
            "no_decay": tuple(chosen.no_decay),
            "steps": self.engine.steps,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        digests = {
            name: hashlib.sha256(json.dumps(value).encode()).digest()
            for name, value in alike.items()
        }
        self.ranks.must_agree(
            {**digests, "weights": digest(self.engine.tensors())}, "the ranks must be alike"
        )


def shared_engine(
    make: Callable[[], nn.Module],
    path: Path,
    forwards: Ranks,
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
    if forwards.rank == 0:
        model = make()
        ZO2(model, storage=path, **options).close()
    dist.barrier()
    if empty is None:
        with init_empty_weights(include_buffers=False):
            model = make()
    else:
        model = empty()
    return ZO2(model, forwards=forwards, storage=path, **options)
