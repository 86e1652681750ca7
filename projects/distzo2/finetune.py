"""`finetune` under torchrun: ZO2's command, shared out among ranks.

The run's folder is ZO2's: the log, checkpoints and the final model are the same files with the same
content. Rank 0 writes them; all ranks must see the folder. After a kill every rank begins at the
checkpoint and replays the log.
"""

import argparse
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from transformers.utils import logging as transformers_logging

from projects.distzo2.engine import DistZO2
from projects.distzo2.meshes import device_mesh, distributed, wire
from projects.distzo2.ranks import Ranks
from projects.zo2 import weights
from projects.zo2.finetune import (
    LOST_STEPS,
    Recipe,
    build_engine,
    empty_model,
    mean_loss,
    same_run,
    show,
)
from projects.zo2.steplog import StepLog, read_log, replay
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import stop_signals
from shared.corpus import Corpus
from shared.errors import UserError
from shared.files import sha256
from shared.models import (
    copy_configuration,
    fingerprint,
    load_tokenizer,
    local_model,
    save_lora_configuration,
)

T = TypeVar("T")


def finetune(options: argparse.Namespace) -> int:
    """One rank's part of the command. Returns the exit status."""
    transformers_logging.set_verbosity_error()
    device_of(options.device)  # known, and there
    recipe = Recipe.of(options)
    with distributed(options.device, options.timeout) as device, ExitStack() as stack:
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % options.pert or (world < 2 and options.pert == 2):
            raise UserError(f"--pert 2 needs an even number of processes, and there are {world}")
        mesh = device_mesh(world // options.pert, options.pert)
        out: Path = options.out
        folder = _together(lambda: local_model(options.model))
        header = {
            "model": {"name": str(options.model), "fingerprint": fingerprint(folder)},
            "data": {"sha256": _together(lambda: sha256(options.data))},
            "settings": asdict(recipe),
        }
        tokenizer = load_tokenizer(folder)

        def begin() -> Corpus:
            stack.enter_context(locked(out, "steps.jsonl"))
            known = read_log(out / "steps.jsonl") if (out / "steps.jsonl").exists() else None
            if known is not None:
                same_run(known.header, header, out)
                if len(known.steps) > options.steps:
                    raise UserError(
                        f"{out} has made {len(known.steps)} steps already; --steps may only grow"
                    )
            return Corpus.build(options.data, tokenizer, recipe.sequence_length, out / "data")

        corpus = _first(begin)
        if corpus is None:
            corpus = Corpus.build(options.data, tokenizer, recipe.sequence_length, out / "data")
        return _Run(options, recipe, folder, corpus, header, mesh, device, rank).go(stack)


class _Run:
    """One call of `finetune` on one rank."""

    def __init__(self, options, recipe, folder, corpus, header, mesh, device, rank):  # type: ignore[no-untyped-def]
        self.options, self.recipe, self.folder, self.corpus, self.header = (
            options,
            recipe,
            folder,
            corpus,
            header,
        )
        self.mesh, self.device, self.rank = mesh, device, rank
        self.out: Path = options.out
        self.lora = recipe.lora_rank is not None
        self.checkpoint = self.out / "checkpoint" / "weights.safetensors"
        self.final = self.out / ("adapter_model.safetensors" if self.lora else "model.safetensors")
        self.working = self.out / "working.safetensors"
        self.console = Console(highlight=False, soft_wrap=True, quiet=rank > 0)

    def go(self, stack: ExitStack) -> int:
        options, recipe, path = self.options, self.recipe, self.out / "steps.jsonl"
        if weights.saved_steps(self.final) == options.steps:
            self.console.print(
                f"{self.out} has been trained for {options.steps} steps already", markup=False
            )
            return 0
        model, stored = empty_model(self.folder, recipe, str(options.model))
        start = max((self.checkpoint, self.final), key=lambda file: weights.saved_steps(file) or 0)
        sliced = options.transfer == "sliced"
        engine, ranks = None, Ranks(self.mesh)
        for turn in (True, False):  # rank 0 first: with slices it writes the file that all train in
            if turn == (self.rank == 0):
                storage = "disk" if sliced else "ram"
                engine = build_engine(
                    model,
                    stored,
                    recipe,
                    start,
                    storage,
                    self.working,
                    self.device,
                    None,
                    mean_loss,
                    write=self.rank == 0,
                    forwards=ranks,
                )
            dist.barrier()
        assert engine is not None
        stack.callback(engine.close)
        ddp = DistZO2(engine, options.transfer, options.check_every)
        log = _first(lambda: StepLog(path, self.header))
        known = log.log if log is not None else read_log(path)
        if log is not None:
            stack.callback(log.close)
        if known is not None and known.steps:
            self.console.print(f"going on after step {len(known.steps)}", markup=False)
            replay(engine, known)
        stopped = self._train(ddp, log)
        if stopped:
            self.console.print(
                f"stopped after step {engine.steps} of {options.steps}; the same command goes on"
                " from there",
                markup=False,
            )
            return 128 + stopped
        if self.rank == 0:
            if self.lora:
                save_lora_configuration(engine.model, self.out)
            else:
                copy_configuration(self.folder, self.out, getattr(torch, recipe.dtype))
        self._save(ddp, self.final)
        self.console.print(
            f"the {'adapter' if self.lora else 'model'} is in {self.out}; {ddp.bytes_sent} bytes"
            " sent by a rank",
            markup=False,
        )
        if self.rank == 0:
            self.working.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint.parent, ignore_errors=True)
        return 0

    def _train(self, ddp: DistZO2, log: StepLog | None) -> int:
        """Steps until the last one. Returns the signal that stopped any rank earlier, or 0."""
        options, recipe, engine = self.options, self.recipe, ddp.engine
        lost = 0
        with (
            stop_signals() as stop,
            Progress(self.console, engine.steps, options.steps) as progress,
        ):
            while engine.steps < options.steps:
                done = engine.steps
                if (
                    done
                    and done % options.checkpoint_every == 0
                    and weights.saved_steps(self.checkpoint) != done
                ):
                    if log is not None:
                        log.flush()
                        self.checkpoint.parent.mkdir(exist_ok=True)
                    self._save(ddp, self.checkpoint)
                signal = torch.tensor([stop[0] if stop else 0], device=wire())
                dist.all_reduce(signal, dist.ReduceOp.MAX)
                if int(signal):
                    return int(signal)
                if lost >= LOST_STEPS:
                    raise UserError(
                        f"the loss was not finite in {lost} steps in a row; try another --out with"
                        " a smaller --lr"
                    )
                batches = self.corpus.step_batches(
                    recipe.seed, done, recipe.batch_size, recipe.accumulate
                )
                batches = [
                    {key: tensor.to(self.device) for key, tensor in batch.items()}
                    for batch in batches
                ]
                step = ddp.step(batches, lr=recipe.rate(done, options.steps))
                if log is not None:
                    log.step(step, engine.order)
                lost = lost + 1 if step.skipped else 0
                show(progress, step, sum(batch["input_ids"].numel() for batch in batches))
        if log is not None:
            log.flush()
        return 0

    def _save(self, ddp: DistZO2, path: Path) -> None:
        """All ranks see the blocks pass; rank 0 writes."""
        if self.rank == 0:
            weights.save_weights(ddp.engine, path, ddp.engine.steps, self.lora)
        else:
            for _ in ddp.engine.tensors():
                pass
        dist.barrier()


def _first(work: Callable[[], T]) -> T | None:
    """What `work` gives on rank 0, None on the others. A UserError there is one on all ranks."""
    found, said = None, b""
    if dist.get_rank() == 0:
        try:
            found = work()
        except UserError as error:
            said = str(error).encode()
    return _agreed(found, said)


def _together(work: Callable[[], T]) -> T:
    """What `work` gives on each rank. A UserError on rank 0 is one on all ranks, so that none waits
    for the others.
    """
    found, said = None, b""
    try:
        found = work()
    except UserError as error:
        said = str(error).encode()
    return _agreed(found, said)  # type: ignore[return-value]


def _agreed(found: T, said: bytes) -> T:
    device = wire()
    length = torch.tensor([len(said)], device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    wrong = [rank for rank, one in enumerate(lengths) if int(one)]
    if wrong:
        text = torch.zeros(int(lengths[wrong[0]]), dtype=torch.uint8, device=device)
        if dist.get_rank() == wrong[0]:
            text = torch.tensor(list(said), dtype=torch.uint8, device=device)
        dist.broadcast(text, wrong[0])
        raise UserError(bytes(text.tolist()).decode())
    return found
