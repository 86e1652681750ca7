"""Table 5: completions of every schedule against those of the full group, and the gradient in micro
batches against the full batch's.

float64; float32 with fixed shapes, where the reference is micro groups in as many slots; and plain
float32, where a rounded bit may tip a draw. The sampler without a cache is one forward of the whole
sequence: it draws each completion again from its own numbers.
"""

from typing import Any

import torch
from pydantic import Field

from projects.infinite_sampling import labels
from projects.infinite_sampling.data import reward
from projects.infinite_sampling.experiments import common
from projects.infinite_sampling.grpo import advantages, backward
from projects.infinite_sampling.predictor import HiddenRidge, Oracle, examples
from projects.infinite_sampling.streams import draw, stream
from shared import experiment


class Config(experiment.Config):
    prompts: int = Field(ge=1)
    """those whose groups are decoded"""
    group: int = Field(ge=2)
    """completions of a prompt"""
    slots: int = Field(ge=1)
    """rows of cache"""
    prefix: int = Field(ge=1)
    """tokens of a completion that the predictor sees"""
    micro_batches: list[int]
    """completions in a backward, whose gradients are compared with the whole group's"""


def run(config: Config, run: experiment.Run) -> None:
    one = common.subject("policy", config.prompts + 8, config.seed, limit=56, run=run)
    jobs = [(p, i) for p in range(config.prompts) for i in range(config.group)]
    more = [(p, i) for p in range(config.prompts, config.prompts + 8) for i in range(16)]
    for dtype, fixed in run.progress(
        [("float64", False), ("float32", True), ("float32", False)], "number formats"
    ):
        one.model.to(getattr(torch, dtype))
        engine = one.engine(config.seed, fixed_shape=fixed)
        known = engine.run(one.prompts, more, common.Schedule("continuous", 32)).completions
        learnt = HiddenRidge()
        learnt.fit(examples(one.prompts, known, config.prefix, one.model))
        truth: dict[tuple[int, int], int] = {}
        schedules = common.schedules(config.slots, config.prefix, learnt, Oracle(truth))
        schedules |= {f"micro groups of {m}": common.Schedule("micro", m) for m in (1, 3, 5)}
        schedules["dynamic slots, tight"] = common.Schedule(
            "dynamic", config.slots, budget_tokens=150, page=4
        )
        if fixed:  # of as many slots, and fixed ones
            schedules = {
                name: s
                for name, s in schedules.items()
                if s.mode in ("micro", "continuous") and s.slots == config.slots
            }
        first = labels.MICRO if fixed else labels.FULL
        reference: list[Any] = []
        schedules[labels.OTHER_SEED] = schedules[first]
        others = one.engine(config.seed + 1, fixed_shape=fixed)
        redrawn: dict[tuple[int, int, tuple[int, ...]], bool] = {}
        for name in [first, *(n for n in schedules if n != first)]:
            source = others if name == labels.OTHER_SEED else engine
            rollout = source.run(one.prompts, jobs, schedules[name])
            reference = reference or rollout.completions
            if source is engine:
                truth.update({(c.prompt, c.index): len(c.tokens) for c in rollout.completions})
            same = [
                a.tokens == b.tokens for a, b in zip(rollout.completions, reference, strict=True)
            ]
            apart = [
                max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
                for a, b, s in zip(rollout.completions, reference, same, strict=True)
                if s
            ]
            run.row(
                kind="completions",
                dtype=dtype,
                fixed_shape=fixed,
                schedule=name,
                completions=len(jobs),
                same=sum(same),
                redrawn=_redrawn(one, rollout.completions, source.seed, redrawn)
                if not fixed and source is engine
                else None,
                logprob_difference_ratio=max(apart, default=None),
                preemptions=rollout.stats.preemptions,
                reingests=rollout.stats.reingests,
            )
        if not fixed:
            _gradients(run, config, one, reference, dtype)


@torch.no_grad()
def _redrawn(
    one: common.Subject,
    completions: Any,
    seed: int,
    known: dict[tuple[int, int, tuple[int, ...]], bool],
) -> int:
    """How many completions a forward without a cache draws again.

    Args:
        known: answers for completions that were asked for before; grows.
    """
    for c in completions:
        if (key := (c.prompt, c.index, tuple(c.tokens))) in known:
            continue
        prompt = one.prompts[c.prompt]
        logits = one.model(
            input_ids=torch.tensor([prompt + c.tokens[:-1]]), use_cache=False
        ).logits[0, len(prompt) - 1 :]
        numbers = torch.from_numpy(stream(seed, prompt, c.index, len(c.tokens)))
        known[key] = draw(logits, numbers, 1.0)[0].tolist() == c.tokens
    return sum(known[c.prompt, c.index, tuple(c.tokens)] for c in completions)


def _gradients(
    run: experiment.Run, config: Config, one: common.Subject, completions: Any, dtype: str
) -> None:
    texts = [one.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    rewards = torch.tensor(reward([one.texts[c.prompt] for c in completions], texts)).reshape(
        config.prompts, config.group
    )
    gains = advantages(rewards).flatten()

    def gradient(micro: int, loss_type: Any, gains: torch.Tensor = gains) -> torch.Tensor:
        one.model.zero_grad()
        backward(
            one.model, one.prompts, completions, gains, 56, micro_batch=micro, loss_type=loss_type
        )
        return torch.cat([p.grad.flatten().double() for p in one.model.parameters()])

    for loss_type in ("grpo", "dapo", "dr_grpo"):
        whole = gradient(len(completions), loss_type)
        for micro in config.micro_batches:
            found = gradient(micro, loss_type)
            run.row(
                kind="gradient",
                dtype=dtype,
                loss_type=loss_type,
                micro_batch=micro,
                gradient_norm_ratio=float(whole.norm()),
                relative_difference_ratio=float((found - whole).norm() / whole.norm())
                if whole.any()
                else None,
            )
    # what a trainer would do that knows a micro batch and not the group
    local = torch.cat([advantages(part[None])[0] for part in rewards.flatten().split(config.slots)])
    whole, found = (gradient(len(completions), "grpo", g) for g in (gains, local))
    run.row(
        kind="own advantages",
        dtype=dtype,
        loss_type="grpo",
        micro_batch=config.slots,
        relative_difference_ratio=float((found - whole).norm() / whole.norm())
        if whole.any()
        else None,
    )
    one.model.zero_grad()
