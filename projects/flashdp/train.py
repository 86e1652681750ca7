"""`train`: what the command line does.

Everything in the run's folder may be released once the run has ended, but for `private/`:

- `run.json`, written once when the run begins: its settings, the noise found for them, which model
  and data;
- `key`, 32 secret bytes for their owner alone, gone when the run has ended: the batch and the noise
  of each step follow from them;
- `checkpoint.safetensors`, replaced as a whole: weights, the optimizer's state, the accountant's
  history;
- `log.jsonl`, a line a step; `data/` and `eval-data/`, the tokens, gone when the run has ended.

Going on means: the checkpoint, then the steps since once more. They have the batches and the noise
they had before, so that they are the same release again and cost nothing. Under fresh noise a step
made twice would be two releases, whose mean is less noisy than either, and both would have to be
counted. (The weights are then the same to the bit on a CPU, with as many threads as before; a GPU
adds in no fixed order. The noise is the same anywhere.)
"""

import argparse
import dataclasses
import decimal
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from projects.flashdp import accounting
from projects.flashdp.accounting import Mechanism, PrivacyReport
from projects.flashdp.losses import finite_mean, per_sample_loss
from projects.flashdp.private import DPModel, make_private, untie
from projects.flashdp.sampling import PoissonSampling, micro_batches
from shared import runs
from shared.corpus import Batch, Corpus, sha256
from shared.errors import UserError
from shared.meters import peak_rss_bytes
from shared.models import (
    add_lora,
    copy_configuration,
    fingerprint,
    load_pretrained,
    load_tokenizer,
    local_model,
    save_lora_configuration,
)
from shared.seeding import step_seed

LOST_STEPS = 20  # so many batches in a row without a finite loss end a run
_EARLY = ("data", "eval-data", "key")  # what a run writes into `private` before it has begun
_ACCOUNTING_SHARE = 0.02  # of the time may go into computing epsilon

NOTES = (
    (
        "the number of records and the settings are public; settings chosen by looking at other"
        " runs on these records cost what those spent"
    ),
    (
        "nothing of the folder `private` is released: losses, batch sizes and samples left out are"
        " not covered by the noise"
    ),
)


@dataclass(frozen=True)
class Recipe:
    """The settings that decide which weights a run ends with and what it spends. A run goes on only
    with the same ones.
    """

    epsilon: float | None
    noise_multiplier: float | None
    delta: float
    accountant: str
    clip: float
    noise_seed: int | None
    steps: int
    batch_size: int
    micro_batch: int
    sequence_length: int
    optimizer: str
    lr: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    seed: int
    lora_rank: int | None
    lora_alpha: int | None
    lora_targets: str | None
    backend: str
    dtype: str
    device: str
    gradient_checkpointing: bool

    @classmethod
    def of(cls, options: argparse.Namespace, records: int) -> "Recipe":
        """From the command line, with the defaults that depend on other options or on the data."""
        given = {f.name: getattr(options, f.name) for f in fields(cls)}
        if options.lora_rank is None and (options.lora_alpha or options.lora_targets):
            raise UserError("--lora-alpha and --lora-targets need --lora-rank")
        if options.lora_rank is not None and options.lora_alpha is None:
            given["lora_alpha"] = 2 * options.lora_rank
        if options.noise_seed is not None and options.noise_seed >= 1 << 256:
            raise UserError("--noise-seed must be below 2**256")
        if options.lr is None:
            given["lr"] = 1e-4 if options.lora_rank is None else 1e-3
        if options.delta is None:
            given["delta"] = default_delta(records)
        if options.steps is None:
            given["steps"] = max(1, round(options.epochs * records / options.batch_size))
        given["device"] = torch.device(options.device).type
        return cls(**given)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        along = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.lr_schedule:
            case "linear":
                return self.lr * (1 - along)
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * along)) / 2
        return self.lr


def default_delta(records: int) -> float:
    """A tenth of one over the number of records, rounded down to one digit."""
    return float(
        decimal.Context(prec=1, rounding=decimal.ROUND_DOWN).divide(
            decimal.Decimal(1), decimal.Decimal(10 * records)
        )
    )


def train(options: argparse.Namespace) -> int:
    """`python -m projects.flashdp train`. Returns the exit status."""
    transformers_logging.set_verbosity_error()  # its warnings are for those who write code
    device = runs.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = local_model(options.model)
    out: Path = options.out
    private = out / "private"
    with runs.locked(out, "private/run.json", ("private",)), runs.plain_errors(out):
        begun = (private / "run.json").exists()
        if (
            not begun
            and private.exists()
            and any(
                f.name not in _EARLY and not f.name.endswith(".part") for f in private.iterdir()
            )
        ):
            raise UserError(f"{private} holds other things than a run; name a new folder")
        try:
            return _Run(options, folder, out, device).go()
        finally:
            # it has not begun, and what was prepared for it is of no use
            if not (private / "run.json").exists():
                shutil.rmtree(private, ignore_errors=True)


class _Run:
    """One call of `train`."""

    def __init__(self, options: argparse.Namespace, folder: Path, out: Path, device: torch.device):
        self.options, self.folder, self.out, self.device = options, folder, out, device
        self.private = out / "private"
        self.checkpoint = self.private / "checkpoint.safetensors"
        self.console = Console(highlight=False, soft_wrap=True)
        # samples left out, wholly or in some layers, because their gradient was not finite
        self.dropped = 0
        self.saved = 0  # the steps of the checkpoint

    def go(self) -> int:
        options, out = self.options, self.out
        self.private.mkdir(mode=0o700, exist_ok=True)
        for leftover in self.private.glob(".*.part"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        source = {"model": fingerprint(self.folder), "data": sha256(options.data)}
        known = _read_json(self.private / "run.json")
        if known is not None:
            _same_run(known, source, Recipe.of(options, known["records"]), out)
            if (out / "privacy.json").exists():
                self._tidy()
                self._say(
                    f"{out} has been trained: its {known['settings']['steps']} steps are made and"
                    " its privacy is spent"
                )
                return 0

        tokenizer = load_tokenizer(self.folder)
        corpus = Corpus.build(
            options.data, tokenizer, options.sequence_length, self.private / "data", pack=False
        )
        held_out = None
        if options.eval_data:
            held_out = Corpus.build(
                options.eval_data,
                tokenizer,
                options.sequence_length,
                self.private / "eval-data",
                pack=False,
            )
        self._say(
            f"data: {corpus.rows} records of up to {corpus.length} tokens, {corpus.tokens} in all"
        )
        recipe = Recipe.of(options, corpus.rows)
        if known is None:
            known = {
                **source,
                "records": corpus.rows,
                "tokens": corpus.tokens,
                **_calibrated(recipe, corpus.rows),
                "settings": asdict(recipe),
            }
        elif (corpus.rows, corpus.tokens) != (known["records"], known["tokens"]):
            raise UserError(
                f"{out} holds a run on {known['tokens']} tokens; the tokenizer of --model now makes"
                f" {corpus.tokens} of --data"
            )
        self.recipe, self.known, self.corpus, self.held_out = recipe, known, corpus, held_out
        self.sampling = PoissonSampling(corpus.rows, recipe.batch_size)
        self._say(
            f"privacy: epsilon {known['promised']:.4g} at delta {recipe.delta:g} by the"
            f" {recipe.accountant} accountant; noise multiplier {known['noise_multiplier']:.4f},"
            f" {recipe.steps} steps at sampling rate {self.sampling.sample_rate:.3g}"
        )
        key = self._key()
        self._build(key)
        self._go_on()
        with open(self.private / "log.jsonl", "a", encoding="utf-8") as self.log:
            stopped = self._train()
            if stopped:
                done = self.dp.steps
                self._say(
                    f"stopped after step {done} of {recipe.steps}; the same command goes on from"
                    " there"
                )
                return 128 + stopped
            self._finish()
        self._tidy()
        return 0

    # ---- before the first step ----

    def _key(self) -> bytes:
        """The key of the run: from its folder, or, when it begins, from the operating system."""
        recipe, path = self.recipe, self.private / "key"
        if recipe.noise_seed is not None:
            return recipe.noise_seed.to_bytes(32, "big")
        if "key_digest" not in self.known:
            return os.urandom(32)
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        if _digest(key) != self.known["key_digest"]:
            raise UserError(
                f"{path} is not the key that this run began with, without which its noise cannot be"
                " made again; name another --out"
            )
        return key

    def _build(self, key: bytes) -> None:
        """The model as the run began with it, private."""
        from transformers import AutoModelForCausalLM

        recipe = self.recipe
        model = load_pretrained(AutoModelForCausalLM, self.folder)  # in eval mode: dropout is off
        model.config.use_cache = False
        if recipe.gradient_checkpointing:
            try:
                model.activation_checkpointing_enable()
            except ValueError:
                raise UserError(
                    f"--gradient-checkpointing: {type(model).__name__} has none"
                ) from None
        if recipe.lora_rank is not None:
            torch.manual_seed(step_seed(recipe.seed, "lora"))
            assert recipe.lora_alpha is not None
            targets = recipe.lora_targets.split(",") if recipe.lora_targets else None
            model = add_lora(model, recipe.lora_rank, recipe.lora_alpha, targets, str(self.folder))
        else:
            before = sum(p.numel() for p in model.parameters())
            self.untied = untie(model)
            if self.untied:
                more = sum(p.numel() for p in model.parameters()) - before
                self._say(
                    f"tied weights are given copies of their own, {more / 1e6:.1f} M parameters:"
                    " clipped apart they would break the bound"
                )
        # dropout stays off; layers recompute themselves in training only
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        self.model = model.to(self.device)
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        chosen = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer]
        self.optimizer = chosen(
            [p for _, p in self.trainable], lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        secret: dict[str, Any] = (
            {"key": key} if recipe.noise_seed is None else {"noise_seed": recipe.noise_seed}
        )
        self.dp = make_private(
            self.model,
            self.optimizer,
            self.sampling,
            noise_multiplier=self.known["noise_multiplier"],
            clip=recipe.clip,
            loss_reduction="sum",
            backend=recipe.backend,
            **secret,
        )
        self.batch_seed = int.from_bytes(hashlib.shake_256(key + b"batches").digest(16), "big")
        size, groups = sum(p.numel() for _, p in self.trainable), self.dp.groups
        self._say(
            f"training {size / 1e6:.1f} M parameters in {len(groups)} layers, a sample's gradient"
            f" in each clipped to {groups[0].bound:.3g}"
        )
        if "key_digest" not in self.known:
            if recipe.noise_seed is None:
                _write(self.private / "key", key, 0o600)
            self.known["key_digest"] = _digest(key)
            _write(self.private / "run.json", json.dumps(self.known, indent=2).encode() + b"\n")

    def _go_on(self) -> None:
        """Take up the checkpoint, if there is one; the log ends where it does."""
        path = self.private / "log.jsonl"
        if self.checkpoint.exists():
            self._read_checkpoint()
        lines = [line for line in _read_lines(path) if line["step"] <= self.dp.steps]
        if path.exists():
            spent = self.dp.epsilon(self.recipe.delta, self.recipe.accountant)
            self._say(
                f"going on after step {self.dp.steps} of {self.recipe.steps}: epsilon {spent:.3f}"
                " is spent"
            )
            _write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.evaluated = {line["step"] for line in lines if "held_out_loss" in line}
        self.lost = 0
        for line in (line for line in lines if line.get("batch")):
            self.lost = self.lost + 1 if line["loss"] is None else 0

    # ---- steps ----

    def _train(self) -> int | None:
        """Steps until the last one. Returns the signal that stopped it earlier, if one did."""
        options, recipe, dp = self.options, self.recipe, self.dp
        spent = _Spent(dp, recipe)
        with (
            runs.stop_signals() as stop,
            runs.Progress(self.console, dp.steps, recipe.steps) as progress,
        ):
            while True:
                done = dp.steps
                due = done % options.eval_every == 0 or done == recipe.steps
                if self.held_out is not None and due and done not in self.evaluated:
                    loss = self._evaluate(self.held_out)
                    self.evaluated.add(done)
                    self._record({"step": done, "held_out_loss": loss})
                    progress.line(f"step {done}: held-out loss {loss:.4f}")
                if done == recipe.steps:
                    return None
                if done > self.saved and (stop or done % options.checkpoint_every == 0):
                    self._write_checkpoint()
                if stop:
                    return stop[0]
                if self.lost >= LOST_STEPS:
                    raise UserError(
                        f"no record had a finite loss in {self.lost} batches in a row, the last"
                        f" after step {done}; try another --out with a smaller --lr"
                    )
                made = self._step(stop)
                if made is None:
                    continue
                self._record(made | spent.now())
                progress.step(dp.steps, made["tokens"], made["loss"], str(spent))

    def _step(self, stop: list[int]) -> dict[str, Any] | None:
        """One batch and one release; the line of the log about it. None when a signal came before
        the batch was done: then nothing of it has been released.
        """
        recipe, dp = self.recipe, self.dp
        number = dp.steps
        torch.manual_seed(step_seed(recipe.seed, "torch", number))
        self.optimizer.zero_grad()
        rows = self.sampling.batch(self.batch_seed, number)
        lengths = self.corpus.lengths(rows)
        # By length, to save padding. A sample's loss depends neither on padding nor on its
        # neighbours, nor does the sum on the order.
        rows = rows[np.argsort(lengths, kind="stable")]
        losses = []
        for part in micro_batches(rows, recipe.micro_batch):
            if stop:
                return None
            loss = self._losses(self.corpus.batch(part))
            loss.sum().backward()
            losses.append(loss.detach())
        loss = finite_mean(torch.cat(losses)) if losses else math.nan
        dropped = 0
        if losses:
            dropped = int(
                (~torch.stack([norms.isfinite() for norms in dp.norms().values()]).all(0)).sum()
            )
            self.lost = self.lost + 1 if math.isnan(loss) else 0
        self.dropped += dropped
        rate = recipe.rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {
            "step": dp.steps,
            "batch": len(rows),
            "tokens": int(lengths.sum()),
            "loss": None if math.isnan(loss) else loss,
            "dropped": dropped,
            "lr": rate,
        }

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of each sample."""
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16"
        ):
            logits = self.model(input_ids=batch["input_ids"].to(self.device)).logits
        return per_sample_loss(logits.float(), batch["labels"].to(self.device))

    @torch.no_grad()
    def _evaluate(self, corpus: Corpus) -> float:
        """The mean loss of the first records."""
        rows = np.arange(min(self.options.eval_rows, corpus.rows))
        losses = [
            self._losses(corpus.batch(part))
            for part in micro_batches(rows, self.recipe.micro_batch)
        ]
        return float(torch.cat(losses).mean())

    def _record(self, line: Mapping[str, Any]) -> None:
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    # ---- checkpoints ----

    def _write_checkpoint(self) -> None:
        _sync(self.log)
        tensors = {f"model.{name}": p.detach() for name, p in self.trainable}
        for name, parameter in self.trainable:
            state = self.optimizer.state[parameter]
            tensors |= {
                f"optimizer.{key}.{name}": value
                for key, value in state.items()
                if isinstance(value, Tensor)
            }
        _save_tensors(
            tensors,
            self.checkpoint,
            {"state": json.dumps({**self.dp.state_dict(), "dropped": self.dropped})},
        )
        self.saved = self.dp.steps

    def _read_checkpoint(self) -> None:
        try:
            with safe_open(self.checkpoint, "pt") as file, torch.no_grad():
                state = json.loads(file.metadata()["state"])
                for name, parameter in self.trainable:
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                parameters = dict(self.trainable)
                for stored in file.keys():  # noqa: SIM118 - it is no dict
                    kind, _, rest = stored.partition(".")
                    if kind == "optimizer":
                        key, _, name = rest.partition(".")
                        value, parameter = file.get_tensor(stored), parameters[name]
                        self.optimizer.state[parameter][key] = (
                            value.to(parameter.device) if value.ndim else value
                        )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.checkpoint} is damaged ({error}); name another --out") from None
        self.dp.load_state_dict(state)
        self.dropped, self.saved = state["dropped"], self.dp.steps

    # ---- after the last step ----

    def _finish(self) -> None:
        """The model and what is promised of it appear in the folder; `privacy.json`, the last of
        it, says that it is whole.
        """
        _sync(self.log)
        report = self._report()
        model = self.dp.unwrap()
        partial = self.out / ".model.part"
        partial.mkdir()
        try:
            self._write_model(model, partial)
            (partial / "privacy.txt").write_text(f"{report}\n")
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for file in sorted(partial.iterdir()):
            os.replace(file, self.out / file.name)
        partial.rmdir()
        about = asdict(report) | {
            "noise_multiplier": self.known["noise_multiplier"],
            "target_epsilon": self.recipe.epsilon,
        }
        if math.isinf(report.epsilon):  # for which JSON has no number
            about["epsilon"] = None
        _write(self.out / "privacy.json", json.dumps(about, indent=2).encode() + b"\n")
        self._say(str(report))
        if self.dropped:
            self._say(
                f"{self.dropped} samples were left out of a step because their gradient was not"
                " finite (not to be released)"
            )
        if self.device.type == "cuda":
            peak = f"peak GPU memory {torch.cuda.max_memory_allocated(self.device) / 1e9:.2f} GB"
        else:
            peak = f"peak memory {peak_rss_bytes() / 1e9:.2f} GB"
        what = "model" if self.recipe.lora_rank is None else "adapter"
        self._say(
            f"the {what} is in {self.out}; leave {self.private} out when you release it (losses are"
            f" not private); {peak}"
        )

    def _write_model(self, model: Any, folder: Path) -> None:
        """What from_pretrained, or PEFT, loads."""
        if self.recipe.lora_rank is None:
            copy_configuration(self.folder, folder, torch.float32)
            if self.untied:
                config = json.loads((folder / "config.json").read_text()) | {
                    "tie_word_embeddings": False
                }
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _save_tensors(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
            # safetensors lets none but its maker read a file
            shutil.copymode(folder / "config.json", folder / "model.safetensors")
        else:
            from peft import get_peft_model_state_dict

            # True and "auto" may ask the hub
            adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
            _save_tensors(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
            save_lora_configuration(model, folder)
            shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")

    def _report(self) -> PrivacyReport:
        notes = list(NOTES)
        if self.held_out is not None:
            notes.append("the held-out data is public, or what its losses showed is counted apart")
        if (self.folder / "privacy.json").exists():
            notes.append(
                "the model that this run began with was itself trained privately: for records in"
                " the data of both, epsilons add up"
            )
        report = self.dp.report(self.recipe.delta, self.recipe.accountant)
        return dataclasses.replace(report, assumptions=(*report.assumptions, *notes))

    def _tidy(self) -> None:
        """Nothing is left that a finished run does not need, the key first of all."""
        for name in ("key", "checkpoint.safetensors"):
            (self.private / name).unlink(missing_ok=True)
        for name in ("data", "eval-data"):
            shutil.rmtree(self.private / name, ignore_errors=True)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)


class _Spent:
    """Epsilon as the steps go by, computed so seldom that they hardly wait for it."""

    def __init__(self, dp: DPModel, recipe: Recipe):
        self._dp, self._recipe = dp, recipe
        self._next = 0.0
        self._last: tuple[int, float] | None = None

    def now(self) -> dict[str, float]:
        """{"epsilon": ...}, or nothing when it is too early for another look."""
        began = time.perf_counter()
        if began < self._next and self._dp.steps < self._recipe.steps:
            return {}
        found = self._dp.epsilon(self._recipe.delta, self._recipe.accountant)
        ended = time.perf_counter()
        self._next = ended + (ended - began) / _ACCOUNTING_SHARE
        self._last = self._dp.steps, found
        return {"epsilon": found} if math.isfinite(found) else {}

    def __str__(self) -> str:
        return (
            "" if self._last is None else f"epsilon {self._last[1]:.3f} after step {self._last[0]}"
        )


def _calibrated(recipe: Recipe, records: int) -> dict[str, float]:
    """The noise multiplier and the epsilon of all steps."""
    if recipe.batch_size > records:
        raise UserError(
            f"--batch-size {recipe.batch_size} is more than the {records} records of --data"
        )
    accounting.check_delta(recipe.delta, records)
    rate, sigma = recipe.batch_size / records, recipe.noise_multiplier
    if sigma is None:
        assert recipe.epsilon is not None
        sigma = accounting.noise_multiplier(
            recipe.epsilon, recipe.delta, rate, recipe.steps, recipe.accountant
        )
    return {
        "noise_multiplier": sigma,
        "promised": accounting.epsilon(
            [Mechanism(sigma, rate, recipe.steps)], recipe.delta, recipe.accountant
        ),
    }


def _same_run(
    known: Mapping[str, Any], source: Mapping[str, str], recipe: Recipe, out: Path
) -> None:
    """Refuse to go on with something else than what the run in `out` began with."""
    for key, what in (("model", "another --model"), ("data", "other --data")):
        if known[key] != source[key]:
            raise UserError(f"{out} holds a run with {what}; name another --out")
    before = known["settings"]
    different = [key for key, value in asdict(recipe).items() if before.get(key) != value]
    if different == ["steps"] and recipe.steps > before["steps"]:
        spent = Mechanism(
            known["noise_multiplier"], recipe.batch_size / known["records"], recipe.steps
        )
        cost = accounting.epsilon([spent], recipe.delta, recipe.accountant)
        raise UserError(
            f"the noise of the run in {out} is for {before['steps']} steps and epsilon"
            f" {known['promised']:.3f}; {recipe.steps} steps would spend epsilon {cost:.3f}; name"
            " another --out"
        )
    for key in different:
        option = key.replace("_", "-")
        raise UserError(
            f"{out} holds a run with --{option} {before.get(key)}, not {getattr(recipe, key)}; name"
            " another --out"
        )


# ---- files ---------------------------------------------------------------------------------------


def _digest(key: bytes) -> str:
    """Tells keys apart and says nothing of them."""
    return hashlib.shake_256(key + b"digest").hexdigest(16)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); name another --out") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The log's lines as far as they are whole."""
    found = []
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                found.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return found


def _write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """The file appears with all its content or not at all."""
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            _sync(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """As `_write`; OSError where the disk is full."""
    partial = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata
        )
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        reason = re.search(r"os error (\d+)", str(error))
        if reason:
            raise OSError(int(reason[1]), os.strerror(int(reason[1]))) from None
        raise
    os.replace(partial, path)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
