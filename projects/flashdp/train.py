"""The command `train`: private fine-tuning in a folder, which goes on where it was stopped.

Everything in the run's folder may be released once the run has ended, but for `private/`:

- `run.json`, written once when the first step is made: its settings, the noise found for them,
  which model and data;
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
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from projects.flashdp import accounting
from projects.flashdp.accounting import Mechanism, PrivacyReport
from projects.flashdp.finetuning import FineTuning, Spent
from projects.flashdp.recipe import Recipe
from projects.flashdp.sampling import PoissonSampling
from shared.commands.checkpoint import load_checkpoint, save_checkpoint
from shared.commands.folder import locked, same_run
from shared.commands.key import digest
from shared.commands.log import Log
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.corpus import Corpus
from shared.errors import UserError
from shared.files import (
    atomic_files,
    atomic_json,
    atomic_save,
    atomic_write,
    read_json,
    remove,
    sha256,
)
from shared.meters import peak_rss_bytes
from shared.models import (
    check_length,
    copy_configuration,
    empty_causal_lm,
    fingerprint,
    load_tokenizer,
    local_model,
    save_lora_configuration,
)

LOST_STEPS = 20  # so many batches in a row without a finite loss end a run
_EARLY = (
    "data",
    "eval-data",
    "key",
    "log.jsonl",
)  # what a run writes into `private` before it has begun

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


def train(options: argparse.Namespace) -> int:
    """`python -m projects.flashdp train`. Returns the exit status."""
    transformers_logging.set_verbosity_error()  # its warnings are for those who write code
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = local_model(options.model)
    out: Path = options.out
    private = out / "private"
    with locked(out, "private/run.json", ("private",)):
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
                remove(private)


class _Run:
    """One call of `train`."""

    def __init__(self, options: argparse.Namespace, folder: Path, out: Path, device: torch.device):
        self.options, self.folder, self.out, self.device = options, folder, out, device
        self.private = out / "private"
        self.checkpoint = self.private / "checkpoint.safetensors"
        self.console = Console(highlight=False, soft_wrap=True)
        self.saved = 0  # the steps of the checkpoint

    def go(self) -> int:
        options, out = self.options, self.out
        self.private.mkdir(mode=0o700, exist_ok=True)
        remove(*self.private.glob(".*.part"))
        source = {"model": fingerprint(self.folder), "data": sha256(options.data)}
        known = read_json(self.private / "run.json")
        if known is not None:  # before anything of the run that is there is replaced
            same_run(known, source, out)
            _same_settings(known, Recipe.resolved(options, known["records"]), out)
            if (out / "privacy.json").exists():
                self._tidy()
                self._say(
                    f"{out} has been trained: its {known['settings']['steps']} steps are made and"
                    " its privacy is spent"
                )
                return 0

        check_length(empty_causal_lm(self.folder), options.sequence_length)
        tokenizer = load_tokenizer(self.folder)
        corpus = Corpus.build(
            options.data, tokenizer, options.sequence_length, self.private / "data", pack=False
        )
        tokens = digest({"tokens": self.private / "data"})
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
        recipe = Recipe.resolved(options, corpus.rows)
        if known is None:
            known = {
                **source,
                "records": corpus.rows,
                "tokens": tokens,
                **_calibrated(recipe, corpus.rows),
                "settings": recipe.record(),
            }
        elif tokens != known["tokens"]:
            raise UserError(
                f"{out} holds a run on other tokens than the tokenizer of --model now makes of"
                " --data; name another --out"
            )
        self.recipe, self.known, self.corpus, self.held_out = recipe, known, corpus, held_out
        self.sampling = PoissonSampling(corpus.rows, recipe.batch_size)
        self._say(
            f"privacy: epsilon {_number(known['promised']):.4g} at delta {recipe.delta:g} by the"
            f" {recipe.accountant} accountant; noise multiplier {known['noise_multiplier']:.4f},"
            f" {recipe.steps} steps at sampling rate {self.sampling.sample_rate:.3g}"
        )
        self._begin(self._key())
        with self._go_on() as self.log:
            self._train()
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

    def _begin(self, key: bytes) -> None:
        """Make the model private."""
        recipe = self.recipe
        self.tuning = tuning = FineTuning(
            self.folder,
            recipe,
            self.corpus,
            self.sampling,
            self.known["noise_multiplier"],
            key,
            self.known["tokens"].encode(),
            self.device,
        )
        self.dp = tuning.dp
        if tuning.untied_parameters:
            self._say(
                "tied weights are given copies of their own,"
                f" {tuning.untied_parameters / 1e6:.1f} M parameters: clipped apart they would"
                " break the bound"
            )
        size, groups = sum(p.numel() for _, p in tuning.trainable), self.dp.groups
        self._say(
            f"training {size / 1e6:.1f} M parameters in {len(groups)} layers, a sample's gradient"
            f" in each clipped to {groups[0].bound:.3g}"
        )
        self.key = key

    def _bind(self) -> None:
        """The run has begun: from here on only the same command goes on in its folder. (A command
        that fails before a first step may be mended and given again.)
        """
        if "key_digest" not in self.known:
            if self.recipe.noise_seed is None:
                atomic_write(self.private / "key", self.key, 0o600)
            self.known["key_digest"] = _digest(self.key)
            atomic_json(self.private / "run.json", self.known)

    def _go_on(self) -> Log:
        """Take up the checkpoint, if there is one. The log, which ends where it does."""
        path = self.private / "log.jsonl"
        state = load_checkpoint(self.checkpoint, dict(self.tuning.trainable), self.tuning.optimizer)
        if state is not None:
            self.tuning.dropped = state.pop("dropped")
            self.dp.load_state_dict(state)
            self.saved = self.dp.steps
        if path.exists():
            spent = self.dp.epsilon(self.recipe.delta, self.recipe.accountant)
            self._say(
                f"going on after step {self.dp.steps} of {self.recipe.steps}: epsilon {spent:.3f}"
                " is spent"
            )
        log = Log(path, keep=lambda line: line["step"] <= self.dp.steps)
        self.evaluated = {line["step"] for line in log.lines if "held_out_loss" in line}
        for line in (line for line in log.lines if line.get("batch")):
            self.tuning.lost = self.tuning.lost + 1 if line["loss"] is None else 0
        return log

    # ---- steps ----

    def _train(self) -> None:
        """Steps until the last one. Raises Stopped where a signal came earlier."""
        options, recipe, dp, tuning = self.options, self.recipe, self.dp, self.tuning
        spent = Spent(dp, recipe)
        with (
            stop_signals() as stop,
            Progress(self.console, dp.steps, recipe.steps) as progress,
        ):
            while True:
                done = dp.steps
                due = done % options.eval_every == 0 or done == recipe.steps
                if self.held_out is not None and due and done not in self.evaluated:
                    loss = tuning.evaluate(self.held_out, options.eval_rows)
                    self.evaluated.add(done)
                    self._record({"step": done, "held_out_loss": loss})
                    progress.line(f"step {done}: held-out loss {loss:.4f}")
                if done == recipe.steps:
                    return
                if done > self.saved and (stop or done % options.checkpoint_every == 0):
                    self._write_checkpoint()
                if stop:
                    raise Stopped(
                        f"stopped after step {done} of {recipe.steps}; the same command goes on"
                        " from there",
                        stop[0],
                    )
                if tuning.lost >= LOST_STEPS:
                    raise UserError(
                        f"no record had a finite loss in {tuning.lost} batches in a row, the last"
                        f" after step {done}; try another --out with a smaller --lr"
                    )
                made = tuning.step(stop)
                if made is None:
                    continue
                self._bind()
                self._record(made | spent.now())
                progress.step(dp.steps, made["tokens"], made["loss"], str(spent))

    def _record(self, line: Mapping[str, Any]) -> None:
        self.log.write(line, sync=False)

    def _write_checkpoint(self) -> None:
        self.log.sync()
        state = {**self.dp.state_dict(), "dropped": self.tuning.dropped}
        parameters = dict(self.tuning.trainable)
        save_checkpoint(self.checkpoint, parameters, self.tuning.optimizer, state)
        self.saved = self.dp.steps

    # ---- after the last step ----

    def _finish(self) -> None:
        """The model and what is promised of it appear in the folder; `privacy.json`, the last of
        it, says that it is whole.
        """
        self.log.sync()
        report = self._report()
        model = self.dp.unwrap()
        with atomic_files(self.out) as partial:
            self._write_model(model, partial)
            (partial / "privacy.txt").write_text(f"{report}\n")
        about = asdict(report) | {
            "noise_multiplier": self.known["noise_multiplier"],
            "target_epsilon": self.recipe.epsilon,
        }
        about["epsilon"] = _finite(report.epsilon)
        atomic_json(self.out / "privacy.json", about)
        self._say(str(report))
        if self.tuning.dropped:
            self._say(
                f"{self.tuning.dropped} samples were left out of a step because their gradient was"
                " not finite (not to be released)"
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
            if self.tuning.untied_parameters:
                config = json.loads((folder / "config.json").read_text()) | {
                    "tie_word_embeddings": False
                }
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            atomic_save(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        else:
            from peft import get_peft_model_state_dict

            # True and "auto" may ask the hub
            adapters = get_peft_model_state_dict(model, save_embedding_layers=False)
            atomic_save(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
            save_lora_configuration(model, folder)

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
        remove(
            *(
                self.private / name
                for name in ("key", "checkpoint.safetensors", "data", "eval-data")
            )
        )

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)


def _calibrated(recipe: Recipe, records: int) -> dict[str, float | None]:
    """The noise multiplier, and the epsilon of all steps (`promised`; None: infinite)."""
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
    promised = accounting.epsilon(
        [Mechanism(sigma, rate, recipe.steps)], recipe.delta, recipe.accountant
    )
    return {"noise_multiplier": sigma, "promised": _finite(promised)}


def _same_settings(known: Mapping[str, Any], recipe: Recipe, out: Path) -> None:
    """Refuse to go on with other settings than those that the run in `out` began with."""
    before, now = known["settings"], recipe.record()
    if recipe.steps > before["steps"] and {**before, "steps": recipe.steps} == now:
        spent = Mechanism(
            known["noise_multiplier"], recipe.batch_size / known["records"], recipe.steps
        )
        cost = accounting.epsilon([spent], recipe.delta, recipe.accountant)
        raise UserError(
            f"the noise of the run in {out} is for {before['steps']} steps and epsilon"
            f" {_number(known['promised']):.3f}; {recipe.steps} steps would spend epsilon"
            f" {cost:.3f}; name another --out"
        )
    same_run(before, now, out)


def _finite(epsilon: float) -> float | None:
    """None for infinity, for which JSON has no number."""
    return epsilon if math.isfinite(epsilon) else None


def _number(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon


def _digest(key: bytes) -> str:
    """Tells keys apart and says nothing of them."""
    return hashlib.shake_256(key + b"digest").hexdigest(16)
