"""`finetune` under torchrun: ZO2's command, shared out among ranks.

The run's folder is ZO2's: the log, checkpoints and the final model are the same files with the same
content. Rank 0 writes them; all ranks must see the folder. After a kill every rank begins at the
checkpoint and replays the log.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import logging as transformers_logging

from projects.distzo2.command import Sharing
from projects.distzo2.engine import DistZO2
from projects.distzo2.meshes import device_mesh, distributed
from projects.distzo2.ranks import Ranks
from projects.zo2 import ZO2, weights
from projects.zo2.command import Recipe
from projects.zo2.runs import (
    CHECKPOINT,
    EARLY,
    LOG,
    WORKING,
    build_engine,
    check_goes_on,
    check_losses,
    empty_model,
    header_of,
    lost_steps,
    micro_batches,
    newest,
    save_model,
    show,
    warn_of_drift,
)
from projects.zo2.steplog import StepLog, read_log, replay
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.corpus import Corpus
from shared.errors import UserError
from shared.files import remove
from shared.models import Stored, check_length, load_tokenizer, local_model

T = TypeVar("T")


def finetune(options: argparse.Namespace) -> int:
    """One rank's part of the command. Returns the exit status."""
    transformers_logging.set_verbosity_error()
    device_of(options.device)  # known, and there
    recipe, sharing = Recipe.of(options), Sharing.from_options(options)
    with distributed(options.device, sharing.timeout) as device, ExitStack() as stack:
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % sharing.pert or (world < 2 and sharing.pert == 2):
            raise UserError(f"--pert 2 needs an even number of processes, and there are {world}")
        mesh = device_mesh(world // sharing.pert, sharing.pert)
        out: Path = options.out
        _first(lambda: stack.enter_context(locked(out, LOG, EARLY, lines=2)))  # 1: the header
        inputs = _together(lambda: _Inputs(options, recipe))

        def corpus() -> Corpus:
            return Corpus.build(
                options.data, inputs.tokenizer, recipe.sequence_length, out / "data"
            )

        def begin() -> Corpus:
            check_goes_on(read_log(out / LOG), inputs.header, recipe, options.steps, out)
            return corpus()

        text = _first(begin) or corpus()  # rank 0 has written what the others open
        return _Run(options, recipe, sharing, inputs, text, mesh, device, rank).go(stack)


class _Inputs:
    """What the user hands over besides the text, checked."""

    def __init__(self, options: argparse.Namespace, recipe: Recipe):
        self.folder = local_model(options.model)
        self.model: Any
        self.stored: dict[str, Stored]
        self.model, self.stored = empty_model(self.folder, recipe, str(options.model))
        check_length(self.model, recipe.sequence_length)
        self.tokenizer = load_tokenizer(self.folder)
        self.header = header_of(
            recipe, str(options.model), self.folder, options.data, self.tokenizer
        )


@dataclass
class _Run:
    """One call of `finetune` on one rank."""

    options: argparse.Namespace
    recipe: Recipe
    sharing: Sharing
    inputs: _Inputs
    corpus: Corpus
    mesh: DeviceMesh
    device: torch.device
    rank: int

    def __post_init__(self) -> None:
        self.out: Path = self.options.out
        self.console = Console(highlight=False, soft_wrap=True, quiet=self.rank > 0)

    def go(self, stack: ExitStack) -> int:
        options, recipe, out = self.options, self.recipe, self.out
        if weights.saved_steps(out / recipe.weights_file) == options.steps:
            self._say(f"{out} has been trained for {options.steps} steps already")
            return 0
        warn_of_drift(recipe, self._say)
        engine = self._engine()
        stack.callback(engine.close)
        ddp = DistZO2(engine, self.sharing.transfer, self.sharing.check_every)
        log = _first(lambda: stack.enter_context(StepLog(out / LOG, self.inputs.header)))
        known = log.records if log is not None else read_log(out / LOG)
        lost = 0
        if known is not None and known.steps:
            self._say(f"going on after step {len(known.steps)}")
            lost = lost_steps(known)
            replay(engine, known)
        stopped = self._train(ddp, log, lost)
        if stopped and self.rank:  # the first speaks for all
            return 128 + stopped
        if stopped:
            raise Stopped(
                f"stopped after step {engine.steps} of {options.steps}; the same command goes on"
                " from there",
                stopped,
            )
        self._save(ddp, lambda: save_model(engine, recipe, self.inputs.folder, out))
        self._say(
            f"the {'model' if recipe.lora_rank is None else 'adapter'} is in {out};"
            f" {ddp.ranks.bytes_sent} bytes sent by a rank"
        )
        if self.rank == 0:
            remove(out / WORKING, (out / CHECKPOINT).parent)
        return 0

    def _engine(self) -> ZO2:
        engine, forwards = None, Ranks(self.mesh)
        start = newest(self.out, self.recipe)
        for turn in (True, False):  # rank 0 first: with slices it writes the file that all train in
            if turn == (self.rank == 0):
                engine = build_engine(
                    self.inputs.model,
                    self.inputs.stored,
                    self.recipe,
                    start,
                    "disk" if self.sharing.transfer == "sliced" else "ram",
                    self.out / WORKING,
                    self.device,
                    None,
                    write=self.rank == 0,
                    forwards=forwards,
                )
            dist.barrier()
        assert engine is not None
        return engine

    def _train(self, ddp: DistZO2, log: StepLog | None, lost: int) -> int:
        """Steps until the last one. Returns the signal that stopped any rank earlier, or 0."""
        options, recipe, engine = self.options, self.recipe, ddp.engine
        with (
            stop_signals() as stop,
            Progress(self.console, engine.steps, options.steps) as progress,
        ):
            while True:
                done = engine.steps
                check_losses(lost, done, options.steps)
                if done == options.steps:
                    break
                if (
                    done
                    and done % options.checkpoint_every == 0
                    and weights.saved_steps(self.out / CHECKPOINT) != done
                ):
                    self._checkpoint(ddp, log)
                signal = torch.tensor([stop[0] if stop else 0])
                dist.all_reduce(signal, dist.ReduceOp.MAX)
                if int(signal):
                    return int(signal)
                batches = micro_batches(self.corpus, recipe, done, self.device)
                step = ddp.step(batches, lr=recipe.rate(done, options.steps))
                if log is not None:
                    log.step(step, engine.order)
                lost = lost + 1 if step.skipped else 0
                show(progress, step, sum(batch["input_ids"].numel() for batch in batches))
        if log is not None:
            log.flush()
        return 0

    def _checkpoint(self, ddp: DistZO2, log: StepLog | None) -> None:
        if log is not None:
            log.flush()
        path, lora = self.out / CHECKPOINT, self.recipe.lora_rank is not None
        self._save(ddp, lambda: weights.save_weights(ddp.engine, path, ddp.engine.steps, lora))

    def _save(self, ddp: DistZO2, write: Callable[[], None]) -> None:
        """All ranks see the weights pass and refuse what is not finite; rank 0 writes."""
        if self.rank == 0:
            write()
        else:
            for _ in ddp.engine.finite_tensors():
                pass
        dist.barrier()

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)


def _first(work: Callable[[], T]) -> T | None:
    """What `work` gives on rank 0, None on the others. A UserError there is one on all ranks."""
    return _together(work if dist.get_rank() == 0 else lambda: None)


def _together(work: Callable[[], T]) -> T:
    """What `work` gives on each rank. A UserError on one rank is one on all, so that none waits for
    the others.
    """
    made, said = None, b""
    try:
        made = work()
    except UserError as error:
        said = str(error).encode()
    length = torch.tensor([len(said)])
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    wrong = [rank for rank, length in enumerate(lengths) if int(length)]
    if wrong:
        text = torch.zeros(int(lengths[wrong[0]]), dtype=torch.uint8)
        if dist.get_rank() == wrong[0]:
            text = torch.tensor(list(said), dtype=torch.uint8)
        dist.broadcast(text, wrong[0])
        raise UserError(bytes(text.tolist()).decode())
    return cast(T, made)
