"""Table 6 and figure 5: GRPO with the full group, with micro groups and with the full framework,
and TRL's trainer with its own rollout and with this one; from the same weights, on the same
prompts, with the same loss and optimizer.

They take each step in turn. Rewards must be the same at every step wherever completions are this
engine's: completions are, and so are gradients but for rounding. TRL draws others of its own, and
computes in float32. A finite pool of prompts, seen several times; held-out prompts are sampled at
both ends. The predictor is fitted online in the framework; another that was fitted once, at the
first step, shows what the drift of lengths does to it. After the last step one more is made under
the meter of bytes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from projects.infinite_sampling import labels
from projects.infinite_sampling.baselines import TrlSteps
from projects.infinite_sampling.data import reward
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.grpo import advantages, backward
from projects.infinite_sampling.predictor import HiddenRidge, Online, evaluate, examples
from projects.infinite_sampling.trl_rollout import rollout, rollout_seed
from shared import experiment
from shared.seeding import step_seed

Mode = Literal[labels.TRAINERS]  # type: ignore[valid-type]


class Config(experiment.Config):
    """TRL's modes run in float32 alone. A backward is of `slots` completions, but of all in mode
    `full group`.
    """

    pool: int = Field(ge=1)
    """prompts that are trained on"""
    held_out: int = Field(ge=1)
    """other prompts, for evaluation"""
    prompts_per_step: int = Field(ge=1)
    """prompts of a step"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    slots: int = Field(ge=1)
    """rows of cache"""
    prefix: int = Field(ge=0)
    """tokens of a completion that the predictor sees"""
    steps: int = Field(ge=1)
    """optimizer steps of each mode"""
    lr: float = Field(gt=0)
    """learning rate of AdamW"""
    dtypes: list[Literal["float64", "float32"]]
    """number formats, one run of all modes in each"""
    modes: list[Mode]
    """trainers and rollouts, by their names in tables"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where it runs"""


class _Policy:
    """One mode's model on its way."""

    def __init__(self, mode: Mode, config: Config, one: common.Subject) -> None:
        self.mode, self.config, self.subject = mode, config, one
        self.model = copy.deepcopy(one.model)
        self.meter, self.clock = common.Meter(config.device), common.clock_of(config.device)
        self.rollout_seconds = 0.0
        self.online: Online | None = None
        self.frozen: HiddenRidge | None = None
        if mode in (labels.TRAINED_FRAMEWORK, labels.TRL_OURS):
            self.online = Online(HiddenRidge(), config.prefix, every=4, model=self.model)
        self.schedule = {
            labels.FULL: common.Schedule("full"),
            labels.MICRO: common.Schedule("micro", config.slots),
        }.get(
            mode,
            common.Schedule("continuous", config.slots, "plan_sjf", config.prefix, self.online),
        )
        self.micro = config.prompts_per_step * config.group if mode == labels.FULL else config.slots
        self.trl: TrlSteps | None = None
        if not mode.startswith(labels.TRL):
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0
            )
            return
        self.trl = TrlSteps(
            self.model,
            one.tokenizer,
            [one.texts[p] for step in range(config.steps + 1) for p in self.chosen(step)],
            reward,
            steps=config.steps + 1,
            prompts_per_step=config.prompts_per_step,
            group=config.group,
            micro_batch=config.slots,
            limit=one.limit,
            lr=config.lr,
            seed=config.seed,
            phase=self.rolling,
            rollout_func=rollout(self.schedule, self.online) if mode == labels.TRL_OURS else None,
        )

    def chosen(self, step: int) -> list[int]:
        """The prompts of a step."""
        size = self.config.prompts_per_step
        return [(step * size + i) % self.config.pool for i in range(size)]

    @contextmanager
    def rolling(self) -> Iterator[None]:
        """Around the rollout: its time, and its bytes where they are measured."""
        start = self.clock()
        with self.meter.rollout():
            yield
        self.rollout_seconds = self.clock() - start

    def step(self, step: int) -> tuple[list[float], dict[str, Any]]:
        """Make a step. Rewards of its completions, and columns of its row."""
        if self.trl is None:
            return self._own(step)
        start = self.clock()
        rewards, lengths = self.trl.step()
        seconds = self.clock() - start
        return rewards, {
            "length_tokens": float(np.mean(lengths)),
            "rollout_seconds": self.rollout_seconds,
            "step_seconds": seconds,
        }

    def _own(self, step: int) -> tuple[list[float], dict[str, Any]]:
        config, one, chosen = self.config, self.subject, self.chosen(step)
        jobs = [(p, i) for p in chosen for i in range(config.group)]
        start = self.clock()
        engine = common.Engine(self.model, one.eos, one.limit, seed=rollout_seed(config.seed, step))
        with self.rolling():
            made = engine.run(one.prompts, jobs, self.schedule)
        texts = [one.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made.completions]
        rewards = reward([one.texts[c.prompt] for c in made.completions], texts)
        gains = advantages(
            torch.tensor(rewards, dtype=torch.float64).reshape(len(chosen), config.group)
        ).flatten()
        backwards = self.clock()
        result = backward(
            self.model, one.prompts, made.completions, gains, one.limit, micro_batch=self.micro
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = self.clock() - start
        found = {
            "length_tokens": float(np.mean([len(c.tokens) for c in made.completions])),
            "steps": made.stats.steps,
            "kv_bytes": made.stats.kv_bytes,
            "mismatch_ratio": result.mismatch,
            "rollout_seconds": self.rollout_seconds,
            "backward_seconds": seconds + start - backwards,
            **self._errors(made.completions),
        }
        start = self.clock()
        if self.online is not None:
            self.online.observe(one.prompts, made.completions)
        refit = self.clock() - start
        return rewards, {**found, "refit_seconds": refit, "step_seconds": seconds + refit}

    def _errors(self, completions: list[Any]) -> dict[str, float]:
        """Of the predictor as it is before it learns of these completions, and of one that was
        fitted on the first step's alone.
        """
        if self.online is None:
            return {}
        now = examples(self.subject.prompts, completions, self.config.prefix, self.model)
        if self.frozen is None:
            self.frozen = HiddenRidge()
            self.frozen.fit(now)
            return {}
        if not len(now):
            return {}
        return {
            "frozen_error_tokens": evaluate(self.frozen.predict(now.prefixes), now)["error"],
            "online_error_tokens": evaluate(self.online.predict(now.prefixes), now)["error"],
        }


def run(config: Config, run: experiment.Run) -> None:
    one = common.subject(
        "policy",
        config.pool + config.held_out,
        config.seed,
        limit=56,
        run=run,
        device=config.device,
    )
    for dtype in config.dtypes:
        one.model.to(getattr(torch, dtype))
        policies = [
            _Policy(mode, config, one)
            for mode in config.modes
            if dtype == "float32" or not mode.startswith(labels.TRL)
        ]
        _held_out(run, config, policies, dtype, 0)
        for step in run.progress(config.steps, f"steps in {dtype}"):
            first: list[float] | None = None
            for policy in policies:
                rewards, found = policy.step(step)
                first = first or rewards
                run.row(
                    kind="step",
                    dtype=dtype,
                    mode=policy.mode,
                    step=step,
                    reward_score=float(np.mean(rewards)),
                    same_rewards=rewards == first,
                    **found,
                )
        _held_out(run, config, policies, dtype, config.steps)
        for policy in policies:
            _, peak, rolling, counter = policy.meter.peaks(
                lambda one=policy: one.step(config.steps)
            )
            run.row(
                kind="memory",
                dtype=dtype,
                mode=policy.mode,
                step_peak_bytes=peak,
                rollout_peak_bytes=rolling,
                counter=counter,
            )
            if policy.trl is not None:
                policy.trl.close()


def _held_out(
    run: experiment.Run, config: Config, policies: list[_Policy], dtype: str, step: int
) -> None:
    """Mean rewards on the pool and on held-out prompts. Before the first step all policies are one,
    which is evaluated once.
    """
    scores: dict[str, float] = {}
    for policy in policies:
        if step or not scores:
            scores = _scores(config, policy)
        for kind, score in scores.items():
            run.row(
                kind="evaluation",
                dtype=dtype,
                mode=policy.mode,
                step=step,
                prompts=kind,
                reward_score=score,
            )


def _scores(config: Config, policy: _Policy) -> dict[str, float]:
    """A policy's mean reward by kind of prompts, 16 completions of each."""
    subject, model, training = policy.subject, policy.model, policy.model.training
    model.eval()
    scores = {}
    for kind, prompts in (
        ("pool", range(config.pool)),
        ("held out", range(config.pool, config.pool + config.held_out)),
    ):
        jobs = [(p, i) for p in prompts for i in range(16)]
        engine = common.Engine(
            model, subject.eos, subject.limit, seed=step_seed(config.seed, "evaluation")
        )
        made = engine.run(subject.prompts, jobs, common.Schedule("continuous", 64)).completions
        texts = [subject.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made]
        scores[kind] = float(np.mean(reward([subject.texts[c.prompt] for c in made], texts)))
    model.train(training)
    return scores
