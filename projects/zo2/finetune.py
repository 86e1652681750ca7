"""`finetune`: train the user's model.

What a run leaves in its folder is enough to go on after a crash at any moment, with at most the
step under way lost:

- `steps.jsonl`, the log (see `steplog.py`), whose every line is on the disk before the next step
  begins;
- `checkpoint/weights.safetensors`, replaced as a whole, which remembers after how many steps it was
  written;
- `data/`, the tokens; `working.safetensors`, the file that `--storage disk` trains in place.

Going on means: weights of the checkpoint, then the log's steps since. The working file is of no use
then (a crash may have left it between two steps) and is made anew.
"""

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from projects.zo2 import budget, weights
from projects.zo2.command import Recipe
from projects.zo2.engine import ZO2
from projects.zo2.runs import (
    CHECKPOINT,
    EARLY,
    LOG,
    WORKING,
    build_engine,
    check_goes_on,
    check_losses,
    dtype_of,
    empty_model,
    header_of,
    loss_sum,
    lost_steps,
    mean_loss,
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
from shared.corpus import Batch, Corpus
from shared.errors import UserError
from shared.files import remove
from shared.models import check_length, load_tokenizer, local_model


def finetune(options: argparse.Namespace) -> int:
    """Train as the options of `command.parser` say. Returns the exit status."""
    transformers_logging.set_verbosity_error()  # its warnings are for those who write code
    size = None if options.memory_budget is None else budget.parse_size(options.memory_budget)
    device = device_of(options.device)
    recipe = Recipe.of(options)
    storage = options.storage or ("ram" if size is None or device.type == "cuda" else "disk")
    if storage == "none" and recipe.storage_dtype:
        raise UserError(
            "--storage-dtype needs --storage ram or disk: blocks that never leave the device are"
            " not stored"
        )
    if size is not None:  # the tokenizer's threads would keep an unpredictable share of it
        budget.return_freed_memory()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = local_model(options.model)
    with locked(options.out, LOG, EARLY, lines=2):  # the first is the header
        return _Run(options, recipe, folder, device, storage, size).go()


@dataclass
class _Run:
    """One call of `finetune`.

    Attributes:
        folder: of the base model.
        storage: ram, disk or none.
        size: bytes of the memory budget, if there is one.
        peak: bytes allocated, at most.
    """

    options: argparse.Namespace
    recipe: Recipe
    folder: Path
    device: torch.device
    storage: str
    size: int | None
    peak: int = 0

    def __post_init__(self) -> None:
        self.out: Path = self.options.out
        self.console = Console(highlight=False, soft_wrap=True)

    def go(self) -> int:
        options, recipe, out = self.options, self.recipe, self.out
        model, stored = empty_model(self.folder, recipe, str(options.model))
        check_length(model, recipe.sequence_length)
        tokenizer = load_tokenizer(self.folder)
        header = header_of(recipe, str(options.model), self.folder, options.data, tokenizer)
        check_goes_on(read_log(out / LOG), header, recipe, options.steps, out)
        if weights.saved_steps(out / recipe.weights_file) == options.steps:
            self._tidy()
            self._say(f"{out} has been trained for {options.steps} steps already")
            return 0

        warn_of_drift(recipe, self._say)
        length = recipe.sequence_length
        corpus = Corpus.build(options.data, tokenizer, length, out / "data")
        held_out = None
        if options.eval_data:
            held_out = Corpus.build(options.eval_data, tokenizer, length, out / "eval-data")
        assert recipe.probe is not None
        work = budget.Workload(
            recipe.batch_size,
            recipe.accumulate,
            max(c.length for c in (corpus, held_out) if c is not None),
            recipe.probe,
            self.storage,
            dtype_of(recipe.storage_dtype),
            self.device,
            torch.get_num_threads(),
        )
        plan = budget.make_plan(model, work, self.size)
        where = {"ram": "in memory", "disk": "on disk", "none": "on the device"}[self.storage]
        slots = "" if self.storage == "none" else f", {plan.slots} visiting at a time"
        self._say(
            f"data: {corpus.rows} rows of up to {corpus.length} tokens, {corpus.tokens} in all"
        )
        self._say(
            f"plan: blocks {where}{slots}, noise {'kept' if plan.cache_noise else 'redrawn'};"
            f" {plan}"
        )

        with ExitStack() as stack:
            stack.enter_context(budget.limit(self.size, self.device))
            start = newest(out, recipe)
            engine = build_engine(
                model,
                stored,
                recipe,
                start,
                self.storage,
                out / WORKING,
                self.device,
                plan,
                self._loss,
            )
            stack.callback(engine.close)
            if self.storage == "ram" and self.size is not None and self.device.type == "cpu":
                budget.account_for(engine.host_nbytes)
            log = stack.enter_context(StepLog(out / LOG, header))
            made = len(log.records.steps)
            if engine.steps > made:
                raise UserError(
                    f"{start} is of step {engine.steps}, {out / LOG} ends at step {made}: one of"
                    " them is not this run's"
                )
            if made:
                missing = made - engine.steps
                self._say(f"going on after step {made}: {missing} steps are replayed from the log")
                replay(engine, log.records)
            self._train(engine, log, corpus, held_out)
            log.flush()
            save_model(engine, recipe, self.folder, out)
            self._sample()
            self._report(engine)
        self._tidy()
        return 0

    def _train(self, engine: ZO2, log: StepLog, corpus: Corpus, held_out: Corpus | None) -> None:
        """Steps until the last one. Raises Stopped when a signal comes earlier."""
        options, recipe, records = self.options, self.recipe, log.records
        checkpoint = self.out / CHECKPOINT
        lost = lost_steps(records)
        with (
            stop_signals() as stop,
            Progress(self.console, engine.steps, options.steps) as progress,
        ):
            while True:
                done = engine.steps
                check_losses(lost, done, options.steps)
                if (
                    held_out is not None
                    and done not in records.evaluations
                    and (done % options.eval_every == 0 or done == options.steps)
                ):
                    log.flush()
                    log.evaluation(
                        _evaluate(engine, held_out, options.eval_rows, recipe.batch_size)
                    )
                    progress.line(f"step {done}: held-out loss {records.evaluations[done]:.4f}")
                if done == options.steps:
                    return
                if (
                    done
                    and done % options.checkpoint_every == 0
                    and weights.saved_steps(checkpoint) != done
                ):
                    log.flush()
                    weights.save_weights(engine, checkpoint, done, recipe.lora_rank is not None)
                if stop:
                    raise Stopped(
                        f"stopped after step {done} of {options.steps}; the same command goes on"
                        " from there",
                        stop[0],
                    )
                batches = micro_batches(corpus, recipe, done, self.device)
                step = engine.step(batches, lr=recipe.rate(done, options.steps))
                log.step(step, engine.order)
                lost = lost + 1 if step.skipped else 0
                show(progress, step, sum(batch["input_ids"].numel() for batch in batches))

    def _report(self, engine: ZO2) -> None:
        traffic = engine.traffic
        moved = (
            f"; moved {budget.format_size(traffic.bytes_up)} up,"
            f" {budget.format_size(traffic.bytes_down)} down"
            if traffic.bytes_up
            else ""
        )
        if self.device.type == "cuda":
            peak = (
                "peak GPU memory"
                f" {budget.format_size(torch.cuda.max_memory_allocated(self.device))}"
            )
        else:
            peak = (
                f"peak memory {budget.format_size(self.peak)} allocated,"
                f" {budget.format_size(budget.memory('VmHWM'))} resident"
            )
        self._say(
            f"the {'model' if self.recipe.lora_rank is None else 'adapter'} is in {self.out};"
            f" {peak}{moved}"
        )

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = mean_loss(model, batch)
        self._sample()  # all logits are alive now
        return loss

    def _sample(self) -> None:
        self.peak = max(self.peak, budget.memory("VmData"))

    def _tidy(self) -> None:
        """Nothing is left that a finished run does not need."""
        remove(self.out / WORKING, (self.out / CHECKPOINT).parent)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)


def _evaluate(engine: ZO2, corpus: Corpus, rows: int, batch_size: int) -> float:
    """Mean next-token loss on the first `rows` rows."""

    def run(model: nn.Module) -> float:
        total, count = 0.0, 0
        for start in range(0, min(rows, corpus.rows), batch_size):
            batch = corpus.batch(range(start, min(start + batch_size, rows, corpus.rows)))
            losses, tokens = loss_sum(
                model, {key: tensor.to(engine.device) for key, tensor in batch.items()}
            )
            total, count = total + losses.item(), count + tokens
        return total / max(1, count)

    return engine.forward(run)
