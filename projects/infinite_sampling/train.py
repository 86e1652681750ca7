"""`train`: GRPO on the user's prompts with the user's reward function.

After each step (`--checkpoint-every`) weights and optimizer are on the disk as one file, and the
log has a line for each step up to it. A step is a function of the weights before it and of its
number: completions are, by their streams, and so is the order of prompts. Going on after a crash
therefore makes again exactly what was lost. What the predictor has learnt is not kept: it decides
how fast a step is, and nothing else.
"""

import argparse
import copy
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from projects.infinite_sampling import grpo
from projects.infinite_sampling.prompts import (
    Prompts,
    engine_of,
    load,
    same_run,
    schedule_of,
    whole_lines,
)
from projects.infinite_sampling.rollout import Completion, Stats
from shared.commands.folder import locked
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import stop_signals
from shared.errors import UserError
from shared.files import atomic_files, atomic_save, atomic_write, remove, sha256
from shared.models import (
    add_lora,
    copy_configuration,
    fingerprint,
    local_model,
    save_lora_configuration,
)
from shared.seeding import step_seed

Reward = Callable[..., Sequence[float]]


def train(options: argparse.Namespace) -> int:
    """`python -m projects.infinite_sampling train`. Returns the exit status."""
    device = device_of(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.group < 2:
        raise UserError("--group 1 has no group mean to compare with; give at least 2")
    if options.lora_alpha and not options.lora_rank:
        raise UserError("--lora-alpha needs --lora-rank")
    if options.temperature == 0:
        raise UserError(
            "--temperature 0 makes all completions of a group equal: there is nothing to learn from"
        )
    reward = reward_function(options.reward)
    folder = local_model(options.model)
    data = sha256(options.prompts)
    with locked(options.out, "log.jsonl", early=("run.json", "checkpoint.safetensors")):
        return Training(options, folder, data, reward, device).go()


def reward_function(name: str) -> Reward:
    """`module:function`, looked up from the current folder. UserError when it is not there."""
    module, _, function = name.partition(":")
    if not function:
        raise UserError(
            f"--reward {name}: write module:function, as rewards:exact for exact() of rewards.py"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UserError(f"--reward {name}: {error}") from None
    except AttributeError:
        raise UserError(f"--reward {name}: {module} has no {function}") from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UserError(f"--reward {name}: {function} is no function")
    reward: Reward = found
    return reward


def rewards_of(
    reward: Reward, prompts: Prompts, completions: Sequence[Completion], texts: Sequence[str]
) -> Tensor:
    """One finite number for each completion, float64. UserError when the function raises or gives
    anything else.
    """
    columns = {
        key: [values[c.prompt] for c in completions] for key, values in prompts.columns.items()
    }
    try:
        found = reward(
            prompts=[prompts.texts[c.prompt] for c in completions],
            completions=list(texts),
            **columns,
        )
    except Exception as error:  # the user's own code
        raise UserError(
            f"the reward function raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    try:
        numbers = torch.tensor([float(value) for value in found], dtype=torch.float64)
    except (TypeError, ValueError):
        raise UserError("the reward function must return a list of numbers") from None
    if len(numbers) != len(completions):
        raise UserError(
            f"the reward function returned {len(numbers)} numbers for {len(completions)}"
            " completions"
        )
    if not numbers.isfinite().all():
        place = int((~numbers.isfinite()).int().argmax())
        raise UserError(
            f"the reward function returned {numbers[place].item()} for the completion"
            f" {texts[place][:60]!r}"
        )
    return numbers


class Training:
    """One call of `train`."""

    def __init__(
        self,
        options: argparse.Namespace,
        folder: Path,
        data: str,
        reward: Reward,
        device: torch.device,
    ) -> None:
        self.options, self.folder, self.reward, self.device = options, folder, reward, device
        self.out: Path = options.out
        self.checkpoint = self.out / "checkpoint.safetensors"
        self.console = Console(highlight=False, soft_wrap=True)
        self.micro = options.micro_batch or options.slots
        self.rate = options.lr if options.lr is not None else 1e-5 if options.lora_rank else 1e-6
        settings = (
            *(
                "max_new_tokens",
                "temperature",
                "stop",
                "seed",
                "dtype",
                "group",
                "reward",
                "prompts_per_step",
                "updates",
                "loss",
                "clip",
            ),
            *("beta", "weight_decay", "max_grad_norm", "lora_rank", "lora_alpha"),
        )
        self.about = {
            "model": fingerprint(folder),
            "prompts": data,
            "lr": self.rate,
            **{key: getattr(options, key) for key in settings},
        }

    def go(self) -> int:
        options = self.options
        model, tokenizer = load(self.folder, options.dtype, self.device)
        self.prompts = Prompts.read(options.prompts, tokenizer)
        self.tokenizer = tokenizer
        if options.prompts_per_step > len(self.prompts.texts):
            raise UserError(
                f"--prompts-per-step {options.prompts_per_step} is more than the"
                f" {len(self.prompts.texts)} prompts of the file"
            )
        frozen = copy.deepcopy(model) if options.beta and not options.lora_rank else None
        if options.lora_rank:
            torch.manual_seed(step_seed(options.seed, "lora"))
            model = add_lora(
                model,
                options.lora_rank,
                options.lora_alpha or 2 * options.lora_rank,
                None,
                str(self.folder),
            )
        self.model = model
        self.reference = (
            grpo.reference_of(model, frozen, options.temperature) if options.beta else None
        )
        self.trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in self.trainable],
            lr=self.rate,
            weight_decay=options.weight_decay,
            betas=(0.9, 0.95),
        )
        self.schedule, self.online = schedule_of(options, len(tokenizer), model)
        # refuses what it cannot drive, before anything is written
        engine_of(options, model, tokenizer, 0)
        same_run(self.out / "run.json", self.about)
        done = self._read_checkpoint()
        path = self.out / "log.jsonl"
        lines = [line for line in whole_lines(path) if line["step"] <= done]
        if len(lines) != done:
            raise UserError(
                f"{path} has {len(lines)} of the {done} steps of the checkpoint; name another --out"
            )
        if done > options.steps:
            raise UserError(f"{self.out} has made {done} steps already; --steps may only grow")
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        if done:
            self._say(f"going on after step {done} of {options.steps}")
        with (
            open(path, "a", encoding="utf-8") as log,
            stop_signals() as stop,
            Progress(self.console, done, options.steps) as bar,
        ):
            saved = done
            apart = max((line["mismatch"] for line in lines), default=0.0)
            while done < options.steps and not stop:
                line = self.step(done)
                done += 1
                apart = max(apart, line["mismatch"])
                log.write(json.dumps(line) + "\n")
                log.flush()
                if done % options.checkpoint_every == 0 or done == options.steps:
                    os.fsync(log.fileno())
                    self._write_checkpoint(done)
                    saved = done
                told = (
                    f"reward {line['reward']:.3f}, length {line['length']:.0f}, slots"
                    f" {line['occupancy']:.0%} busy"
                )
                bar.step(done, line["tokens"], line["loss"], told)
            if saved < done:
                os.fsync(log.fileno())
                self._write_checkpoint(done)
        if stop and done < options.steps:
            self._say(
                f"stopped after step {done} of {options.steps}; the same command goes on from there"
            )
            return 128 + stop[0]
        self._write_model()
        self._say(
            f"log-probabilities when sampled and when trained on differed by {apart:.1e} at the"
            " most"
        )
        self._say(f"the {'adapter' if options.lora_rank else 'model'} is in {self.out}")
        return 0

    def step(self, number: int) -> dict[str, Any]:
        """Step `number`, from 0: rollout, rewards, advantages, backward in micro batches, update.
        Returns the line of the log.
        """
        options = self.options
        chosen = self._chosen(number)
        engine = engine_of(
            options, self.model, self.tokenizer, step_seed(options.seed, "rollout", number)
        )
        jobs = [(prompt, index) for prompt in chosen for index in range(options.group)]
        made = engine.run(self.prompts.tokens, jobs, self.schedule)
        texts = [
            self.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made.completions
        ]
        rewards = rewards_of(self.reward, self.prompts, made.completions, texts).reshape(
            len(chosen), options.group
        )
        gains = grpo.advantages(rewards, scale=options.loss != "dr_grpo").flatten()
        old = None
        if options.updates > 1:
            old = grpo.old_logprobs(
                self.model, self.prompts.tokens, made.completions, self.micro, options.temperature
            )
        first: grpo.Result | None = None
        for update in range(options.updates):
            self.optimizer.zero_grad()
            result = grpo.backward(
                self.model,
                self.prompts.tokens,
                made.completions,
                gains,
                options.max_new_tokens,
                micro_batch=self.micro,
                loss_type=options.loss,
                eps=options.clip,
                beta=options.beta,
                temperature=options.temperature,
                reference=self.reference,
                old=old if update else None,
            )
            norm = float(
                torch.nn.utils.clip_grad_norm_(
                    [p for _, p in self.trainable], options.max_grad_norm
                )
            )
            if not math.isfinite(norm):
                raise UserError(
                    f"the gradient of step {number + 1} is not finite; try another --out with a"
                    " smaller --lr"
                )
            self.optimizer.step()
            first = first or result
        assert first is not None
        if self.online is not None:
            self.online.observe(self.prompts.tokens, made.completions)
        return self._line(
            number + 1, chosen, rewards, made.completions, made.stats, first, result, norm
        )

    def _line(
        self,
        step: int,
        chosen: list[int],
        rewards: Tensor,
        completions: list[Completion],
        stats: Stats,
        first: Any,
        last: Any,
        norm: float,
    ) -> dict[str, Any]:
        return {
            "step": step,
            "prompts": chosen,
            "reward": float(rewards.mean()),
            "rewards": rewards.flatten().tolist(),
            "length": float(np.mean([len(c.tokens) for c in completions])),
            "truncated": sum(c.finish == "length" for c in completions) / len(completions),
            "loss": first.loss,
            "mismatch": first.mismatch,
            "clipped": last.clipped,
            "gradient_norm": norm,
            "tokens": stats.tokens,
            "decoding_steps": stats.steps,
            "occupancy": stats.occupancy,
            "kv_bytes": stats.kv_bytes,
        }

    def _chosen(self, number: int) -> list[int]:
        """The prompts of a step: each pass over them is in a new order."""
        count, size = len(self.prompts.texts), self.options.prompts_per_step
        places = range(number * size, number * size + size)
        orders = {
            place // count: (
                np.random.default_rng(
                    step_seed(self.options.seed, "order", place // count)
                ).permutation(count)
            )
            for place in places
        }
        return [int(orders[place // count][place % count]) for place in places]

    # ---- files ----

    def _write_checkpoint(self, steps: int) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.trainable}
        for name, parameter in self.trainable:
            state = self.optimizer.state[parameter]
            tensors |= {
                f"optimizer.{key}.{name}": value
                for key, value in state.items()
                if isinstance(value, Tensor)
            }
        atomic_save(tensors, self.checkpoint, {"steps": str(steps)})

    def _read_checkpoint(self) -> int:
        """Take up the checkpoint, if there is one; the number of its steps."""
        if not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, "pt") as file, torch.no_grad():
                for name, parameter in self.trainable:
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                parameters = dict(self.trainable)
                for stored in file.keys():  # noqa: SIM118 - it is no dict
                    kind, _, rest = stored.partition(".")
                    if kind == "optimizer":
                        key, _, name = rest.partition(".")
                        value = file.get_tensor(stored)
                        self.optimizer.state[parameters[name]][key] = (
                            value.to(self.device) if value.ndim else value
                        )
                return int(file.metadata()["steps"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.checkpoint} is damaged ({error}); name another --out") from None

    def _write_model(self) -> None:
        """What from_pretrained, or PEFT, loads."""
        if self.options.lora_rank:
            from peft import get_peft_model_state_dict

            save_lora_configuration(self.model, self.out)
            # True and "auto" may ask the hub
            adapters = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            atomic_save(adapters, self.out / "adapter_model.safetensors", {"format": "pt"})
            return
        copy_configuration(self.folder, self.out, getattr(torch, self.options.dtype))
        with atomic_files(self.out) as partial:
            self.model.save_pretrained(partial)  # it knows which tensors are tied
            remove(*(file for file in partial.iterdir() if ".safetensors" not in file.name))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)
