"""`train`: GRPO on the user's prompts with the user's reward function.

After each step (`--checkpoint-every`) weights and optimizer are on the disk as one file, and the
log has a line for each step up to it. A step is a function of the weights before it and of its
number: completions are, by their streams, and so is the order of prompts. Going on after a crash
therefore makes again exactly what was lost. What a predictor has learnt is not kept: it decides how
fast a step is, and of its numbers the last bit at the most.
"""

import argparse
import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from projects.infinite_sampling import grpo
from projects.infinite_sampling.prompts import (
    Prompts,
    about,
    check_room,
    engine_of,
    load,
    schedule_of,
)
from projects.infinite_sampling.recipe import TrainRecipe
from projects.infinite_sampling.rollout import Completion, Stats
from shared.commands.checkpoint import load_checkpoint, save_checkpoint
from shared.commands.folder import begin, begun, locked
from shared.commands.inputs import user_code, user_module
from shared.commands.key import digest, source_digest
from shared.commands.log import Log
from shared.commands.options import device_of
from shared.commands.progress import Progress
from shared.commands.signals import Stopped, stop_signals
from shared.errors import UserError
from shared.files import atomic_files, atomic_save, remove
from shared.finite import check_trained
from shared.models import (
    add_lora,
    copy_configuration,
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
    recipe = TrainRecipe.resolved(options)
    reward: Reward = user_module(options.reward, "--reward")
    folder = local_model(options.model)
    with locked(options.out, "log.jsonl", early=("run.json", "checkpoint.safetensors")):
        Training(options, recipe, folder, reward, device).go()
    return 0


def reward_digest(name: str, reward: Reward) -> str:
    """Tells reward functions apart: the name of the function, the code it is written in, and what
    `functools.partial` has bound or an object that can be called holds.

    Raises UserError where it is written in no file, or bound to what cannot be told apart.
    """
    held: list[Any] = []
    written: Any = reward
    while (inner := inspect.unwrap(written)) is not written or isinstance(inner, partial):
        written = inner
        if isinstance(inner, partial):
            held.append([list(inner.args), dict(inner.keywords)])
            written = inner.func
    if not inspect.isroutine(written) and not inspect.isclass(written):
        held.append(dict(getattr(written, "__dict__", {})))
        written = type(written)  # an object that can be called
    try:
        bound = digest({"held": held})
    except (TypeError, ValueError):
        raise UserError(
            f"--reward {name} holds values that cannot be told apart in another run; bind numbers,"
            " texts, lists or arrays"
        ) from None
    source = source_digest(written)
    return digest({"name": name.rpartition(":")[2], "source": source, "held": bound})


def rewards_of(
    name: str,
    reward: Reward,
    prompts: Prompts,
    completions: Sequence[Completion],
    texts: Sequence[str],
) -> Tensor:
    """One finite number for each completion, float64.

    Args:
        name: of the function, as the user gave it, for messages.

    Raises:
        UserError: the function raises or gives anything else.
    """
    columns = {
        key: [values[c.prompt] for c in completions] for key, values in prompts.columns.items()
    }
    with user_code(f"--reward {name}"):
        found = reward(
            prompts=[prompts.texts[c.prompt] for c in completions],
            completions=list(texts),
            **columns,
        )
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
        recipe: TrainRecipe,
        folder: Path,
        reward: Reward,
        device: torch.device,
    ) -> None:
        self.options, self.recipe, self.folder = options, recipe, folder
        self.reward, self.device = reward, device
        self.out: Path = options.out
        self.checkpoint = self.out / "checkpoint.safetensors"
        self.console = Console(highlight=False, soft_wrap=True)
        self.micro = recipe.micro_batch or recipe.slots

    def go(self) -> None:
        recipe, path = self.recipe, self.out / "log.jsonl"
        known = self._prepare() | {"reward": reward_digest(self.options.reward, self.reward)}
        begin(self.out / "run.json", known, begun(path))
        state = load_checkpoint(self.checkpoint, self.masters, self.optimizer)
        self._follow_masters()
        done: int = state["steps"] if state else 0
        if done > recipe.steps:
            raise UserError(f"{self.out} has made {done} steps already; --steps may only grow")
        with (
            Log(path, keep=lambda line: line["step"] <= done) as log,
            stop_signals() as stop,
        ):
            if len(log.lines) != done:
                raise UserError(
                    f"{path} has {len(log.lines)} of the {done} steps of the checkpoint; name"
                    " another --out"
                )
            if done:
                self._say(f"going on after step {done} of {recipe.steps}")
            with Progress(self.console, done, recipe.steps) as bar:
                while done < recipe.steps:
                    line = self.step(done)
                    done += 1
                    log.write(line, sync=False)
                    if stop or done % self.options.checkpoint_every == 0 or done == recipe.steps:
                        log.sync()
                        save_checkpoint(
                            self.checkpoint, self.masters, self.optimizer, {"steps": done}
                        )
                    told = (
                        f"reward {line['reward']:.3f}, length {line['length']:.0f}, slots"
                        f" {line['occupancy']:.0%} busy"
                    )
                    bar.step(done, line["tokens"], line["loss"], told)
                    if stop and done < recipe.steps:
                        raise Stopped(
                            f"stopped after step {done} of {recipe.steps}; the same command goes on"
                            " from there",
                            stop[0],
                        )
            apart = max(line["mismatch"] for line in log.lines)
        self._write_model()
        self._say(
            f"log-probabilities when sampled and when trained on differed by {apart:.1e} at the"
            " most"
        )
        self._say(f"the {'adapter' if recipe.lora_rank else 'model'} is in {self.out}")

    def _prepare(self) -> dict[str, Any]:
        """Read the model and the prompts, and refuse what does not fit. What the result depends on
        but for the reward function.
        """
        recipe = self.recipe
        model, tokenizer = load(self.folder, recipe.dtype, self.device)
        self.prompts = Prompts.read(self.options.prompts, tokenizer)
        self.tokenizer = tokenizer
        if recipe.prompts_per_step > len(self.prompts.texts):
            raise UserError(
                f"--prompts-per-step {recipe.prompts_per_step} is more than the"
                f" {len(self.prompts.texts)} prompts of the file"
            )
        check_room(recipe, self.prompts, model)
        known = about(recipe, self.folder, model, tokenizer, self.prompts)
        frozen = copy.deepcopy(model) if recipe.beta and not recipe.lora_rank else None
        if recipe.lora_rank:
            assert recipe.lora_alpha is not None
            torch.manual_seed(step_seed(recipe.seed, "lora"))
            model = add_lora(model, recipe.lora_rank, recipe.lora_alpha, None, str(self.folder))
        self.model = model
        self.reference = (
            grpo.reference_of(model, frozen, recipe.temperature) if recipe.beta else None
        )
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A step of 1e-6 is lost on a weight in bfloat16, whose neighbours are 0.4 % away.
        self.masters = {
            name: torch.nn.Parameter(p.detach().float()) if p.dtype == torch.bfloat16 else p
            for name, p in self.parameters.items()
        }
        self.optimizer = torch.optim.AdamW(
            self.masters.values(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.95),
        )
        self.schedule, self.online = schedule_of(recipe, len(tokenizer), model)
        engine_of(recipe, model, tokenizer, 0).check(self.prompts.tokens)
        return known

    def step(self, number: int) -> dict[str, Any]:
        """Step `number`, from 0: rollout, rewards, advantages, backward in micro batches, update.
        Returns the line of the log.
        """
        recipe = self.recipe
        chosen = self._chosen(number)
        engine = engine_of(
            recipe, self.model, self.tokenizer, step_seed(recipe.seed, "rollout", number)
        )
        jobs = [(prompt, index) for prompt in chosen for index in range(recipe.group)]
        made = engine.run(self.prompts.tokens, jobs, self.schedule)
        texts = [
            self.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made.completions
        ]
        rewards = rewards_of(
            self.options.reward, self.reward, self.prompts, made.completions, texts
        ).reshape(len(chosen), recipe.group)
        gains = grpo.advantages(rewards, scale=recipe.loss != "dr_grpo").flatten()
        old = None
        if recipe.updates > 1:
            old = grpo.old_logprobs(
                self.model, self.prompts.tokens, made.completions, self.micro, recipe.temperature
            )
        first: grpo.Result | None = None
        for update in range(recipe.updates):
            self.model.zero_grad()
            result = grpo.backward(
                self.model,
                self.prompts.tokens,
                made.completions,
                gains,
                recipe.max_new_tokens,
                micro_batch=self.micro,
                loss_type=recipe.loss,
                eps=recipe.clip,
                beta=recipe.beta,
                temperature=recipe.temperature,
                reference=self.reference,
                old=old if update else None,
            )
            for name, master in self.masters.items():
                if master is not (parameter := self.parameters[name]):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
            norm = float(
                torch.nn.utils.clip_grad_norm_(self.masters.values(), recipe.max_grad_norm)
            )
            if not math.isfinite(norm):
                raise UserError(
                    f"the gradient of step {number + 1} is not finite; try another --out with a"
                    " smaller --lr"
                )
            self.optimizer.step()
            self._follow_masters()
            first = first or result
        assert first is not None
        if self.online is not None:
            self.online.observe(self.prompts.tokens, made.completions)
        return self._line(
            number + 1, chosen, rewards, made.completions, made.stats, first, result, norm
        )

    @torch.no_grad()
    def _follow_masters(self) -> None:
        """Round the weights that are trained in float32 to the model's format."""
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

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
        count, size = len(self.prompts.texts), self.recipe.prompts_per_step
        places = range(number * size, number * size + size)
        orders = {
            place // count: (
                np.random.default_rng(
                    step_seed(self.recipe.seed, "order", place // count)
                ).permutation(count)
            )
            for place in places
        }
        return [int(orders[place // count][place % count]) for place in places]

    def _write_model(self) -> None:
        """What from_pretrained, or PEFT, loads."""
        check_trained(self.parameters.items())
        with atomic_files(self.out) as partial:
            if self.recipe.lora_rank:
                from peft import get_peft_model_state_dict

                save_lora_configuration(self.model, partial)
                # True and "auto" may ask the hub
                adapters = get_peft_model_state_dict(self.model, save_embedding_layers=False)
                atomic_save(adapters, partial / "adapter_model.safetensors", {"format": "pt"})
                return
            self.model.save_pretrained(partial)  # it knows which tensors are tied
            remove(*(file for file in partial.iterdir() if ".safetensors" not in file.name))
            copy_configuration(self.folder, partial, getattr(torch, self.recipe.dtype))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False)
