"""`finetune` and `replay`: what the command line does.

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
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import logging as transformers_logging

from projects.zo2 import budget, weights
from projects.zo2.engine import ZO2, Step
from projects.zo2.forwards import Forwards
from projects.zo2.steplog import Log, StepLog, read_log
from projects.zo2.steplog import replay as replay_log
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import stop_signals
from shared.corpus import IGNORED, Batch, Corpus
from shared.errors import UserError
from shared.files import sha256
from shared.models import (
    Stored,
    add_lora,
    copy_configuration,
    empty_causal_lm,
    fingerprint,
    load_tokenizer,
    local_model,
    save_lora_configuration,
    stored_tensors,
)

LOST_STEPS = 20  # so many losses in a row that are not finite end a run


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which weights a run ends with. They stand in the log; a run goes on
    only with the same ones.

    `flush_every` is None unless blocks are stored in another dtype: only then does it matter when
    an update reaches the store.
    """

    lr: float
    lr_schedule: str
    warmup_steps: int
    eps: float
    weight_decay: float
    probe: str
    seed: int
    dtype: str
    storage_dtype: str | None
    rounding: str
    device: str
    sequence_length: int
    batch_size: int
    accumulate: int
    lora_rank: int | None
    lora_alpha: int | None
    lora_targets: str | None
    flush_every: list[int] | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Recipe":
        """From the command line, with the defaults that depend on other options."""
        given = {f.name: getattr(options, f.name) for f in fields(cls) if f.name != "flush_every"}
        if options.lora_rank is None and (options.lora_alpha or options.lora_targets):
            raise UserError("--lora-alpha and --lora-targets need --lora-rank")
        if options.lora_rank is not None and options.lora_alpha is None:
            given["lora_alpha"] = 2 * options.lora_rank
        if options.lr is None:
            given["lr"] = 1e-6 if options.lora_rank is None else 1e-4
        if options.storage_dtype == options.dtype:
            given["storage_dtype"] = None
        low_bit = given["storage_dtype"] is not None
        if options.rounding == "stochastic" and not low_bit:
            raise UserError("--rounding stochastic needs a --storage-dtype narrower than --dtype")
        given["device"] = torch.device(options.device).type
        every = [options.checkpoint_every, options.eval_every if options.eval_data else 0]
        return cls(**given, flush_every=every if low_bit else None)

    @classmethod
    def read(cls, log: Log, path: Path) -> "Recipe":
        """From the header of a log."""
        try:
            return cls(**log.header["settings"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line 1: {error}; the log is damaged or of another version"
            ) from None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step in a run of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        along = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        match self.lr_schedule:
            case "linear":
                return self.lr * (1 - along)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * along)) / 2
        return self.lr


def loss_sum(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum of the next-token losses, and how many there are. Looks at few logits at a time: they are
    a model's largest tensor.
    """
    logits = model(input_ids=batch["input_ids"]).logits
    labels = batch["labels"][:, 1:]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows = budget.loss_rows(logits.shape[-1])
    for sequence, targets in zip(logits, labels, strict=True):
        for start in range(0, len(targets), rows):
            piece = targets[start : start + rows]
            losses = cross_entropy(
                sequence[start : start + len(piece)].float(),
                piece,
                ignore_index=IGNORED,
                reduction="none",
            )
            total += losses.double().sum()
    return total, int((labels != IGNORED).sum())


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean next-token loss on a batch, in float64."""
    total, count = loss_sum(model, batch)
    return total / max(1, count)


# ---- finetune ------------------------------------------------------------------------------------


def finetune(options: argparse.Namespace) -> int:
    """`python -m projects.zo2 finetune`. Returns the exit status."""
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
    out: Path = options.out
    with locked(out, "steps.jsonl"):
        run = _Run(options, recipe, folder, out, device, storage, size)
        return run.go()


class _Run:
    """One call of `finetune`."""

    def __init__(
        self,
        options: argparse.Namespace,
        recipe: Recipe,
        folder: Path,
        out: Path,
        device: torch.device,
        storage: str,
        size: int | None,
    ):
        self.options, self.recipe, self.folder, self.out = options, recipe, folder, out
        self.device, self.storage, self.size = device, storage, size
        self.console = Console(highlight=False, soft_wrap=True)
        self.checkpoint = out / "checkpoint" / "weights.safetensors"
        self.final = out / (
            "model.safetensors" if recipe.lora_rank is None else "adapter_model.safetensors"
        )
        self.working = out / "working.safetensors"
        self.peak = 0

    def go(self) -> int:
        options, recipe = self.options, self.recipe
        header = {
            "model": {"name": str(options.model), "fingerprint": fingerprint(self.folder)},
            "data": {"sha256": sha256(options.data)},
            "settings": asdict(recipe),
        }
        path = self.out / "steps.jsonl"
        known = read_log(path) if path.exists() else None
        if known is not None:
            same_run(known.header, header, self.out)
            if len(known.steps) > options.steps:
                raise UserError(
                    f"{self.out} has made {len(known.steps)} steps already; --steps may only grow"
                )
            if weights.saved_steps(self.final) == options.steps:
                self._tidy()
                self._say(f"{self.out} has been trained for {options.steps} steps already")
                return 0

        tokenizer = load_tokenizer(self.folder)
        corpus = Corpus.build(options.data, tokenizer, recipe.sequence_length, self.out / "data")
        held_out = None
        if options.eval_data:
            held_out = Corpus.build(
                options.eval_data, tokenizer, recipe.sequence_length, self.out / "eval-data"
            )
        model, stored = empty_model(self.folder, recipe, str(options.model))
        longest = max(c.length for c in (corpus, held_out) if c is not None)
        work = budget.Workload(
            recipe.batch_size,
            recipe.accumulate,
            longest,
            recipe.probe,
            self.storage,
            _dtype(recipe.storage_dtype),
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
            start = max(
                (self.checkpoint, self.final), key=lambda file: weights.saved_steps(file) or 0
            )
            engine = build_engine(
                model,
                stored,
                recipe,
                start,
                self.storage,
                self.working,
                self.device,
                plan,
                self._loss,
            )
            stack.callback(engine.close)
            if self.storage == "ram" and self.size is not None and self.device.type == "cpu":
                budget.account_for(engine.host_nbytes)
            log = StepLog(path, header)
            stack.callback(log.close)
            if engine.steps > len(log.log.steps):
                raise UserError(
                    f"{start} is of step {engine.steps}, {path} ends at step {len(log.log.steps)}:"
                    " one of them is not this run's"
                )
            self._go_on(engine, log)
            stopped = self._train(engine, log, corpus, held_out)
            done = engine.steps
            if stopped:
                self._say(
                    f"stopped after step {done} of {options.steps}; the same command goes on from"
                    " there"
                )
                return 128 + stopped
            self._finish(engine, log)
        self._tidy()
        return 0

    def _go_on(self, engine: ZO2, log: StepLog) -> None:
        """Bring the engine from its checkpoint to the log's end."""
        if not log.log.steps:
            return
        missing = len(log.log.steps) - engine.steps
        self._say(
            f"going on after step {len(log.log.steps)}: {missing} steps are replayed from the log"
        )
        replay_log(engine, log.log)

    def _train(
        self, engine: ZO2, log: StepLog, corpus: Corpus, held_out: Corpus | None
    ) -> int | None:
        """Steps until the last one. Returns the signal that stopped it earlier, if one did."""
        options, recipe = self.options, self.recipe
        lost = 0
        for step in reversed(log.log.steps):
            if not step.skipped:
                break
            lost += 1
        with (
            stop_signals() as stop,
            Progress(self.console, engine.steps, options.steps) as progress,
        ):
            while True:
                done = engine.steps
                if (
                    held_out is not None
                    and done not in log.log.evaluations
                    and (done % options.eval_every == 0 or done == options.steps)
                ):
                    log.flush()
                    log.evaluation(
                        _evaluate(engine, held_out, options.eval_rows, recipe.batch_size)
                    )
                    progress.line(f"step {done}: held-out loss {log.log.evaluations[done]:.4f}")
                if done == options.steps:
                    return None
                if (
                    done
                    and done % options.checkpoint_every == 0
                    and weights.saved_steps(self.checkpoint) != done
                ):
                    log.flush()
                    self.checkpoint.parent.mkdir(exist_ok=True)
                    weights.save_weights(
                        engine, self.checkpoint, done, recipe.lora_rank is not None
                    )
                if stop:
                    return stop[0]
                if lost >= LOST_STEPS:
                    raise UserError(
                        f"the loss was not finite in {lost} steps in a row (the last was"
                        f" {done - 1}); try another --out with a smaller --lr"
                    )
                batches = corpus.step_batches(
                    recipe.seed, done, recipe.batch_size, recipe.accumulate
                )
                batches = [
                    {key: tensor.to(self.device) for key, tensor in batch.items()}
                    for batch in batches
                ]
                step = engine.step(batches, lr=recipe.rate(done, options.steps))
                log.step(step, engine.order)
                lost = lost + 1 if step.skipped else 0
                show(progress, step, sum(batch["input_ids"].numel() for batch in batches))

    def _finish(self, engine: ZO2, log: StepLog) -> None:
        log.flush()
        base = engine.model
        if self.recipe.lora_rank is None:
            copy_configuration(self.folder, self.out, getattr(torch, self.recipe.dtype))
        else:
            save_lora_configuration(base, self.out)
        weights.save_weights(engine, self.final, engine.steps, self.recipe.lora_rank is not None)
        self._sample()
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
        self.working.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)

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


def same_run(known: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Refuse to go on with something else than what the run in `out` began with."""
    for part, key, what in (
        ("model", "fingerprint", "another --model"),
        ("data", "sha256", "other --data"),
    ):
        if known.get(part, {}).get(key) != now[part][key]:
            raise UserError(f"{out} holds a run with {what}; name another --out")
    before = known.get("settings", {})
    for key, value in now["settings"].items():
        if before.get(key) != value:
            option = (
                "checkpoint-every and --eval-every"
                if key == "flush_every"
                else key.replace("_", "-")
            )
            raise UserError(
                f"{out} holds a run with --{option} {before.get(key)}, not {value}; name another"
                " --out"
            )


# ---- replay --------------------------------------------------------------------------------------


def replay(options: argparse.Namespace) -> int:
    """`python -m projects.zo2 replay`. Returns the exit status."""
    transformers_logging.set_verbosity_error()
    log = read_log(options.log)
    if log is None or not log.steps:
        raise UserError(f"{options.log} holds no steps")
    recipe = Recipe.read(log, options.log)
    folder = local_model(options.model)
    if fingerprint(folder) != log.header.get("model", {}).get("fingerprint"):
        raise UserError(
            f"{options.model} is not the model that this run began with"
            f" ({log.header.get('model', {}).get('name')})"
        )
    out: Path = options.out
    lora = recipe.lora_rank is not None
    final = out / ("adapter_model.safetensors" if lora else "model.safetensors")
    console = Console(highlight=False, soft_wrap=True)
    with locked(out, "steps.jsonl"):
        if final.exists() or (out / "steps.jsonl").exists():
            raise UserError(f"{out} holds a model already; name another --out")
        model, stored = empty_model(folder, recipe, str(options.model))
        working = out / "working.safetensors"
        engine = build_engine(
            model,
            stored,
            recipe,
            None,
            options.storage,
            working,
            device_of(recipe.device),
            None,
            mean_loss,
        )
        try:
            with Progress(console, 0, len(log.steps)) as progress:
                replay_log(engine, log, lambda done: show(progress, log.steps[done - 1], 0))
            if lora:
                save_lora_configuration(model, out)
            else:
                copy_configuration(folder, out, getattr(torch, recipe.dtype))
            weights.save_weights(engine, final, len(log.steps), lora)
        finally:
            engine.close()
            working.unlink(missing_ok=True)
    console.print(
        f"the {'adapter' if lora else 'model'} after {len(log.steps)} steps is in {out}",
        markup=False,
    )
    return 0


# ---- what both need ------------------------------------------------------------------------------


def show(progress: Progress, step: Step, tokens: int) -> None:
    """Show a step that has been made on `tokens` tokens."""
    if step.skipped:
        progress.line(f"step {step.number}: the loss is not finite; the step is skipped")
    progress.step(step.number + 1, tokens, None if step.skipped else step.loss)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def empty_model(folder: Path, recipe: Recipe, name: str) -> tuple[Any, dict[str, Stored]]:
    """The model on the meta device, with adapters if the recipe has them, and how the folder holds
    its weights.
    """
    model = empty_causal_lm(folder, getattr(torch, recipe.dtype))
    stored = stored_tensors(model, folder)
    if recipe.lora_rank is not None:
        targets = recipe.lora_targets.split(",") if recipe.lora_targets else None
        assert recipe.lora_alpha is not None
        model = add_lora(model, recipe.lora_rank, recipe.lora_alpha, targets, name, empty=True)
    return model, stored


def build_engine(
    model: Any,
    stored: dict[str, Stored],
    recipe: Recipe,
    start: Path | None,
    storage: str,
    working: Path,
    device: torch.device,
    plan: budget.Plan | None,
    loss: Any,
    write: bool = True,
    forwards: Forwards | None = None,
) -> ZO2:
    """The engine at the weights of the checkpoint `start`, or at the base model's where there is
    none.

    `write` is False where another process has written the working file; `forwards` is `ZO2`'s.
    """
    steps = weights.saved_steps(start) if start is not None else None
    begun = start if steps is not None else None
    if recipe.lora_rank is not None:
        source = weights.adapter_source(weights.folder_source(stored), model, recipe.seed, begun)
    elif begun is not None:
        source = weights.file_source(begun)
    else:
        source = weights.folder_source(stored)
    if storage == "disk":
        if write:
            weights.write_working_file(model, source, working, _dtype(recipe.storage_dtype))
    else:
        weights.fill(model, source)
    engine = ZO2(
        model,
        forwards=forwards,
        lr=recipe.lr,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        probe=recipe.probe,  # type: ignore[arg-type]
        storage={"ram": "ram", "disk": working, "none": None}[storage],  # type: ignore[arg-type]
        storage_dtype=_dtype(recipe.storage_dtype),
        rounding=recipe.rounding,  # type: ignore[arg-type]
        slots=plan.slots if plan else 3,
        cache_noise=plan.cache_noise if plan else True,
        device=device,
        loss=loss,
    )
    engine.steps = steps or 0
    return engine
