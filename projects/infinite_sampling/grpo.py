"""The GRPO step that a rollout feeds: advantages over the whole group, and a backward in micro
batches that is the full batch's.

    J = (1/N) sum_i (1/|o_i|) sum_t [ min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta
    KL_it ],   rho = pi / pi_old, KL_it = pi_ref / pi - log(pi_ref / pi) - 1

over the N = prompts x G completions of a step (Shao et al. 2024). The group-normalised advantage is
the paper's; eps, beta, delta and the form of the standard deviation are not known to us, and are
TRL's: 0.2, 0, 1e-4 and Bessel's.

What a micro batch adds is divided by the denominator of *all* completions, known after the rollout,
so that gradients add up to the full batch's. Advantages never see a micro group.

Losses, gradients and advantages are those of TRL 1.16's `GRPOTrainer` at its usual settings, where
an optimizer step has a rollout of its own (`steps_per_generation` = `gradient_accumulation_steps`),
whatever the micro batches. What differs otherwise:

- `dapo`: where a rollout is shared out over several optimizer steps, TRL divides the sum of a step
  by the *mean* number of tokens of these steps, tokens of the rollout x gradient_accumulation_steps
  / steps_per_generation; here by the step's own. TRL's loss is ours times the second over the
  first.
- `beta`: TRL multiplies the divergence by the ratio unless `use_bias_correction_kl=False`, which
  changes its gradient even where the ratio is 1; here it stands alone, as above.
- `dr_grpo`: TRL scales advantages by the group's deviation unless `scale_rewards="none"`, whatever
  the loss; `train` here never does so for `dr_grpo`, as its authors had it.
- TRL computes rewards, advantages and (of a wider model as well) log-probabilities in float32, and
  leaves of equal rewards what rounding leaves, over 1e-4; here they are float64, the model's format
  but at least float32, and exactly 0.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from projects.infinite_sampling.rollout import Completion

LossType = Literal["grpo", "dapo", "dr_grpo"]
DELTA = 1e-4  # beside the standard deviation
_LOGITS_BYTES = 1 << 28  # of logits in float32 that are looked at together


def advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Group-normalised rewards, float64.

    Args:
        rewards: [prompts, G].
        scale: divide by the group's standard deviation; `dr_grpo` does not.

    Returns:
        [prompts, G]; exactly 0 where all rewards of a group are equal.
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(-1, keepdim=True)
    if scale and rewards.shape[-1] > 1:
        centred = centred / (rewards.std(-1, keepdim=True) + DELTA)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return centred.masked_fill(equal, 0.0)


@dataclass(frozen=True)
class Batch:
    """Completions with their prompts, padded on the right, where no token of a causal model sees
    the padding.

    Attributes:
        ids: [rows, tokens].
        mask: [rows, tokens - 1], whether the token after each is of the completion.
        sampled: [rows, tokens - 1], log-probabilities when they were drawn, 0 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    sampled: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """From completions, which name their prompts by number."""
        rows = [list(prompts[c.prompt]) + c.tokens for c in completions]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros(len(rows), ids.shape[1] - 1, dtype=torch.bool)
        sampled = torch.zeros(mask.shape, dtype=torch.float64)
        for place, (row, one) in enumerate(zip(rows, completions, strict=True)):
            ids[place, : len(row)] = torch.tensor(row)
            start = len(row) - len(one.tokens) - 1
            mask[place, start : len(row) - 1] = True
            sampled[place, start : len(row) - 1] = torch.tensor(one.logprobs, dtype=torch.float64)
        return cls(ids.to(device), mask.to(device), sampled.to(device))


def token_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability of the token after each, [rows, tokens - 1], in float32 or wider; of meaning
    where `batch.mask` is true.
    """
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    pieces = max(1, _LOGITS_BYTES // (4 * logits.shape[1] * logits.shape[2]))
    found = []
    # the widened copy of a vocabulary of 50,000 is the largest tensor of a step
    for start in range(0, len(logits), pieces):
        part = logits[start : start + pieces]
        part = (part if part.dtype == torch.float64 else part.float()) / temperature
        targets = batch.ids[start : start + pieces, 1:, None]
        found.append(part.gather(-1, targets)[..., 0] - torch.logsumexp(part, -1))
    return torch.cat(found)


@dataclass(frozen=True)
class Denominators:
    """What the sums of a step are divided by: `sequences` N, `tokens` of all completions, `limit`
    new tokens at most.
    """

    sequences: int
    tokens: int
    limit: int


def loss_sum(
    logprobs: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    of: Denominators,
    *,
    loss_type: LossType = "grpo",
    eps: float = 0.2,
    beta: float = 0.0,
    reference: Tensor | None = None,
) -> Tensor:
    """What these rows add to the loss of the step, -J.

    Args:
        logprobs, old, reference: [rows, tokens] of the policy, of the one that sampled, of the
            reference model.
        advantage: [rows].
        mask: [rows, tokens].
        of: the denominators of the whole step.
        loss_type: `grpo` the mean over completions of means over tokens; `dapo` the mean over all
            tokens; `dr_grpo` the sum over N x limit.
    """
    ratio = torch.exp((logprobs - old).masked_fill(~mask, 0.0))
    gain = advantage[:, None].to(logprobs.dtype)
    per_token = -torch.minimum(ratio * gain, ratio.clamp(1 - eps, 1 + eps) * gain)
    if beta:
        if reference is None:
            raise ValueError("beta needs a reference model")
        apart = (reference - logprobs).masked_fill(~mask, 0.0)
        per_token = per_token + beta * (torch.exp(apart) - apart - 1)
    per_token = per_token.masked_fill(~mask, 0.0)
    match loss_type:
        case "grpo":
            return (per_token.sum(-1) / mask.sum(-1)).sum() / of.sequences
        case "dapo":
            return per_token.sum() / of.tokens
    return per_token.sum() / (of.sequences * of.limit)


@dataclass(frozen=True)
class Result:
    """Of a backward: the loss; the largest |log-probability when sampled - when trained|; the share
    of tokens whose ratio is clipped, so that they have no gradient.
    """

    loss: float
    mismatch: float
    clipped: float


def backward(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    advantage: Tensor,
    limit: int,
    *,
    micro_batch: int,
    loss_type: LossType = "grpo",
    eps: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    reference: Callable[[Batch], Tensor] | None = None,
    old: Sequence[Tensor] | None = None,
) -> Result:
    """Add the gradient of a step's loss to `.grad`, `micro_batch` completions at a time.

    Args:
        advantage: [completions], from `advantages` over whole groups.
        limit: new tokens at most, of `dr_grpo`.
        reference: log-probabilities of a batch under the reference model; with `beta` only.
        old: for each completion the log-probabilities of its tokens under the policy that sampled
            it, as training computes them (`old_logprobs`); None: the policy is still that one, so
            that ratios are 1.
    """
    of = Denominators(len(completions), sum(len(one.tokens) for one in completions), limit)
    device = next(model.parameters()).device
    total = mismatch = clipped = 0.0
    for start in range(0, len(completions), micro_batch):
        part = completions[start : start + micro_batch]
        batch = Batch.of(prompts, part, device)
        logprobs = token_logprobs(model, batch, temperature)
        if old is None:
            before = logprobs.detach()
        else:
            before = torch.zeros_like(logprobs)
            before[batch.mask] = torch.cat([old[start + i] for i in range(len(part))]).to(logprobs)
        loss = loss_sum(
            logprobs,
            before,
            advantage[start : start + len(part)].to(device),
            batch.mask,
            of,
            loss_type=loss_type,
            eps=eps,
            beta=beta,
            reference=reference(batch) if beta and reference is not None else None,
        )
        loss.backward()
        total += float(loss.detach())
        if old is None:  # later passes over the same rollout have another policy
            mismatch = max(
                mismatch,
                float((logprobs.detach().double() - batch.sampled)[batch.mask].abs().max()),
            )
        ratio, gain = (
            torch.exp(logprobs.detach() - before),
            advantage[start : start + len(part), None].to(device),
        )
        beyond = ((ratio > 1 + eps) & (gain > 0)) | ((ratio < 1 - eps) & (gain < 0))
        clipped += float((beyond & batch.mask).sum())
    return Result(total, mismatch, clipped / of.tokens)


@torch.no_grad()
def old_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    micro_batch: int,
    temperature: float = 1.0,
) -> list[Tensor]:
    """For each completion the log-probabilities of its tokens, for more than one update on a
    rollout.
    """
    found: list[Tensor] = []
    device = next(model.parameters()).device
    for start in range(0, len(completions), micro_batch):
        batch = Batch.of(prompts, completions[start : start + micro_batch], device)
        found += [
            row[mask]
            for row, mask in zip(token_logprobs(model, batch, temperature), batch.mask, strict=True)
        ]
    return found


def reference_of(
    model: Any, frozen: Any = None, temperature: float = 1.0
) -> Callable[[Batch], Tensor]:
    """Log-probabilities under the reference: `frozen`, or a PEFT model with its adapters off."""

    @torch.no_grad()
    def look(batch: Batch) -> Tensor:
        with model.disable_adapter() if frozen is None else nullcontext():
            return token_logprobs(model if frozen is None else frozen, batch, temperature)

    return look
