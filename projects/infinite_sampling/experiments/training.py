"""Table 6 and figure 5: GRPO with the full group, with micro groups and with the full framework, from the same weights with the same seed.

The three take each step in turn. Rewards must be the same at every step: completions are, and so are gradients but for rounding. A finite
pool of prompts, seen several times; held-out prompts are sampled at both ends. The predictor is fitted online in the framework; another
that was fitted once, at the first step, shows what the drift of lengths does to it.
"""

import copy
import time
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from projects.infinite_sampling.experiments import _common
from projects.infinite_sampling.grpo import advantages, backward
from projects.infinite_sampling.policy import reward
from projects.infinite_sampling.predictor import HiddenRidge, Online, evaluate, examples
from shared import experiment
from shared.seeding import step_seed

Mode = Literal["full group", "micro groups", "framework"]


class Config(experiment.Config):
    train_steps: int = Field(default=600, ge=1)
    pool: int = Field(default=8, ge=1)
    held_out: int = Field(default=16, ge=1)
    prompts_per_step: int = Field(default=2, ge=1)
    group: int = Field(default=32, ge=2)
    slots: int = Field(default=8, ge=1)
    prefix: int = Field(default=1, ge=0)
    steps: int = Field(default=40, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    dtypes: list[Literal["float64", "float32"]] = ["float64", "float32"]
    modes: list[Mode] = ["full group", "micro groups", "framework"]


class _Policy:
    """One mode's model on its way."""

    def __init__(self, mode: str, model: Any, config: Config) -> None:
        self.mode, self.model = mode, copy.deepcopy(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.online: Online | None = None
        if mode == "framework":
            self.online = Online(HiddenRidge(), config.prefix, every=4, model=self.model)
        self.schedule = {
            "full group": _common.Schedule("full"),
            "micro groups": _common.Schedule("micro", config.slots),
            "framework": _common.Schedule("continuous", config.slots, "plan_sjf", config.prefix, self.online),
        }[mode]
        self.micro = config.prompts_per_step * config.group if mode == "full group" else config.slots
        self.frozen: HiddenRidge | None = None


def run(config: Config, run: experiment.Run) -> None:
    one = _common.subject("policy", config.pool + config.held_out, config.seed, limit=56, train_steps=config.train_steps, run=run)
    for dtype in config.dtypes:
        one.model.to(getattr(torch, dtype))
        policies = [_Policy(mode, one.model, config) for mode in config.modes]
        _held_out(run, config, one, policies, dtype, 0)
        for step in run.progress(config.steps, f"steps in {dtype}"):
            first: torch.Tensor | None = None
            for policy in policies:
                rewards = _step(run, config, one, policy, dtype, step, first)
                first = rewards if first is None else first
        _held_out(run, config, one, policies, dtype, config.steps)


def _step(
    run: experiment.Run, config: Config, one: _common.Subject, policy: _Policy, dtype: str, step: int, first: torch.Tensor | None
) -> torch.Tensor:
    size = config.prompts_per_step
    chosen = [(step * size + i) % config.pool for i in range(size)]
    jobs = [(p, i) for p in chosen for i in range(config.group)]
    began = time.process_time()
    one_engine = _common.Engine(policy.model, one.eos, one.limit, seed=step_seed(config.seed, "rollout", step))
    rollout = one_engine.run(one.prompts, jobs, policy.schedule)
    rolled = time.process_time()
    texts = [one.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in rollout.completions]
    rewards = torch.tensor(reward([one.texts[c.prompt] for c in rollout.completions], texts), dtype=torch.float64)
    gains = advantages(rewards.reshape(size, config.group)).flatten()
    policy.optimizer.zero_grad()
    result = backward(policy.model, one.prompts, rollout.completions, gains, one.limit, micro_batch=policy.micro)
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
    policy.optimizer.step()
    ended = time.process_time()
    errors: dict[str, float] = {}
    if policy.online is not None:
        now = examples(one.prompts, rollout.completions, config.prefix, policy.model)
        if policy.frozen is None:
            policy.frozen = HiddenRidge()
            policy.frozen.fit(now)
        elif len(now):
            errors["frozen_error_tokens"] = evaluate(policy.frozen.predict(now.prefixes), now)["error"]
            errors["online_error_tokens"] = evaluate(policy.online.predict(now.prefixes), now)["error"]
        policy.online.observe(one.prompts, rollout.completions)
    run.row(
        kind="step",
        dtype=dtype,
        mode=policy.mode,
        step=step,
        reward_score=float(rewards.mean()),
        same_rewards=bool(first is None or torch.equal(first, rewards)),
        length_tokens=float(np.mean([len(c.tokens) for c in rollout.completions])),
        steps=rollout.stats.steps,
        kv_bytes=rollout.stats.kv_bytes,
        mismatch_ratio=result.mismatch,
        rollout_seconds=rolled - began,
        backward_seconds=ended - rolled,
        refit_seconds=time.process_time() - ended,
        **errors,
    )
    return rewards


def _held_out(run: experiment.Run, config: Config, one: _common.Subject, policies: list[_Policy], dtype: str, step: int) -> None:
    for policy in policies:
        for kind, prompts in (("pool", range(config.pool)), ("held out", range(config.pool, config.pool + config.held_out))):
            jobs = [(p, i) for p in prompts for i in range(16)]
            engine = _common.Engine(policy.model, one.eos, one.limit, seed=step_seed(config.seed, "evaluation"))
            made = engine.run(one.prompts, jobs, _common.Schedule("continuous", 64)).completions
            texts = [one.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made]
            found = reward([one.texts[c.prompt] for c in made], texts)
            run.row(kind="evaluation", dtype=dtype, mode=policy.mode, step=step, prompts=kind, reward_score=float(np.mean(found)))
