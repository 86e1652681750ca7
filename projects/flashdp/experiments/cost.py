"""Table "cost": what a step computes and moves, counted operation by operation, for every method.

Floating-point operations are those of the matrix products. Bytes moved are what the operations read
and write: the sum, over all of them but views, of the bytes of their tensors; a cache may serve
some of it. Both are counts and the same in every run.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from projects.flashdp import labels
from projects.flashdp.baselines import trainer
from projects.flashdp.experiments import common
from shared import experiment, meters


class Config(experiment.Config):
    cell: tuple[Literal[tuple(common.DECODERS)], int, int]  # type: ignore[valid-type]
    """what is counted: [model, batch size, tokens of a sequence]"""
    methods: list[common.Method] = Field(min_length=1)
    """those that are compared, by their names in tables"""
    text: common.Text
    """WordNet's glosses, or token ids drawn at random"""
    clip: float = Field(gt=0)
    """bound on a sample's gradient, over all layers"""


def run(config: Config, run: experiment.Run) -> None:
    name, batch_size, tokens = config.cell
    for method in run.progress(config.methods, "methods"):
        ids = common.batch_of(
            config.text, common.DECODERS[name][0], batch_size, tokens, "cpu", config.seed
        )
        one = trainer(
            method,
            common.model_of(name, tokens, "cpu", config.seed),
            batch_size,
            clip=config.clip,
            seed=config.seed,
        )
        one.step(ids[:1])  # makes the optimizer's state
        backward = lambda one=one, ids=ids: one.backward(ids, ids)  # noqa: E731  # forward, backward and clipping; the optimizer is everyone's
        run.row(
            model=name,
            batch_size=batch_size,
            tokens=tokens,
            method=method,
            clipping=labels.clipping(method),
            step_flops=meters.count_flops(backward),
            moved_bytes=moved_bytes(lambda one=one, ids=ids: one.step(ids)),
        )


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        view = any(
            out.alias_info is not None and not out.alias_info.is_write for out in schema.returns
        )
        if not view and function.overloadpacket not in _ALLOCATE:
            written = {id(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            overwrites = any(
                a.alias_info is not None and a.alias_info.is_write and a.kwarg_only
                for a in schema.arguments
            )
            self.nbytes += sum(t.nbytes for t in read if not (overwrites and id(t) in written))
            self.nbytes += sum(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


_ALLOCATE = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.detach,
}


def moved_bytes(work: Callable[[], object]) -> int:
    """The bytes that the operations of `work()` read and write."""
    with _Traffic() as traffic:
        work()
    return traffic.nbytes
