"""Losses, gradients and advantages against TRL's own computation on the same completions, which
shares no code with ours.
"""

import pytest
import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.grpo import advantages, backward, old_logprobs, reference_of
from projects.infinite_sampling.rollout import Schedule

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
PROMPTS, GROUP, LIMIT = [[40, 41, 42], [50, 51, 52, 53, 54]], 4, 12
EPS, BETA = 0.1, 0.3
REWARDS = torch.tensor([[1.0, 0.0, 0.25, 3.0], [0.5, 0.5, 0.0, 0.125]])
LOSSES = ("grpo", "dapo", "dr_grpo")


def shifted(model, seed):
    """Another policy of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    made = type(model)(model.config).to(model.dtype).eval()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return made


def logprobs(model, ids, mask, keep):
    """In the model's own format, where TRL's kernel has float32; each row without its padding, as
    rotary embeddings are float32 too.
    """
    found = []
    for row, seen in zip(ids, mask.bool(), strict=True):
        chances = torch.log_softmax(
            model(input_ids=row[None, seen], use_cache=False).logits[0], -1
        )[:-1].gather(-1, row[seen][1:, None])
        new = int(seen[-keep:].sum())
        found.append(torch.cat([chances[-new:, 0], torch.zeros(keep - new, dtype=chances.dtype)]))
    return torch.stack(found)


@pytest.fixture
def case(trl_trainer):
    """A trainer whose policy has moved on from the one that sampled, completions of that one, and a
    reference; float64.
    """
    trainer = trl_trainer(
        ["ab"], lambda completions, **_: [0.0] * len(completions), dtype=torch.float64
    )
    sampler = shifted(trainer.model, 1)
    reference = shifted(sampler, 3)
    trainer.model.load_state_dict(shifted(sampler, 2).state_dict())
    trainer.model.train()
    trainer.args.use_bias_correction_kl = False
    made = Engine(sampler, [0], LIMIT, seed=6).run(PROMPTS, GROUP, Schedule("micro", 3)).completions
    assert len({len(c.tokens) for c in made}) > 2
    return trainer, sampler, reference, made


def inputs_of(made, gains, sampler, reference):
    """What TRL's `_compute_loss` takes: prompts padded on the left, completions on the right."""
    rows, keep, width = len(made), max(len(c.tokens) for c in made), max(map(len, PROMPTS))
    prompts, completions = (
        torch.zeros(rows, width, dtype=torch.int64),
        torch.zeros(rows, keep, dtype=torch.int64),
    )
    prompt_mask, completion_mask = torch.zeros_like(prompts), torch.zeros_like(completions)
    for row, c in enumerate(made):
        prompt = PROMPTS[c.prompt]
        prompts[row, width - len(prompt) :], prompt_mask[row, width - len(prompt) :] = (
            torch.tensor(prompt),
            1,
        )
        completions[row, : len(c.tokens)], completion_mask[row, : len(c.tokens)] = (
            torch.tensor(c.tokens),
            1,
        )
    ids, mask = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        old, frozen = (logprobs(model, ids, mask, keep) for model in (sampler, reference))
    return {
        "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions,
        "completion_mask": completion_mask,
        "advantages": gains, "old_per_token_logps": old, "ref_per_token_logps": frozen,
    }  # fmt: skip


def theirs(trainer, inputs, tokens, micro, accumulated, loss_type, beta=BETA, eps=EPS):
    """Loss and gradient of TRL, `micro` completions at a time, as its training loop would
    accumulate them.
    """
    trainer.loss_type, trainer.beta, trainer.epsilon_low, trainer.epsilon_high = (
        loss_type,
        beta,
        eps,
        eps,
    )
    trainer.current_gradient_accumulation_steps = accumulated
    trainer.model.zero_grad()
    total = 0.0
    for start in range(0, len(inputs["prompt_ids"]), micro):
        part = {key: value[start : start + micro] for key, value in inputs.items()}
        loss = trainer.compute_loss(
            trainer.model, {**part, "num_items_in_batch": torch.tensor(tokens)}
        )
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()])


def ours(trainer, made, gains, sampler, reference, loss_type, beta=BETA, eps=EPS):
    policy = type(trainer.model)(trainer.model.config).to(trainer.model.dtype).eval()
    policy.load_state_dict(trainer.model.state_dict())
    found = backward(
        policy, PROMPTS, made, gains, LIMIT, micro_batch=3, loss_type=loss_type, eps=eps, beta=beta,
        reference=reference_of(policy, frozen=reference), old=old_logprobs(sampler, PROMPTS, made,
        3),
    )  # fmt: skip
    return found, torch.cat([p.grad.double().flatten() for p in policy.parameters()])


def apart(one, other):
    return float((one - other).norm() / other.norm())


def double(trainer, monkeypatch):
    """TRL's loss of log-probabilities in float64; the entropies, which it asks for with them, are
    only logged.
    """

    def found(model, ids, mask, keep, **_):
        values = logprobs(model, ids, mask, keep)
        return values, values.detach(), None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", found)


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_gradients_are_those_of_trl(case, monkeypatch, loss_type, beta, micro):
    trainer, sampler, reference, made = case
    gains = advantages(REWARDS).flatten()
    tokens = sum(len(c.tokens) for c in made)
    result, mine = ours(trainer, made, gains, sampler, reference, loss_type, beta)
    inputs = inputs_of(made, gains, sampler, reference)
    trainer.args.steps_per_generation = 8 // micro
    loss, kernel = theirs(trainer, inputs, tokens, micro, 8 // micro, loss_type, beta)
    assert apart(mine, kernel) < 1e-5  # as TRL is, with its kernel's float32
    double(trainer, monkeypatch)
    trainer._metrics["train"].clear()
    loss, gradient = theirs(trainer, inputs, tokens, micro, 8 // micro, loss_type, beta)
    assert result.loss == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert float(gradient.norm()) > 0.1
    assert apart(mine, gradient) < 1e-10
    if micro == 8:
        (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
        assert 0.05 < clipped < 0.95
        assert result.clipped == pytest.approx(clipped)


def test_the_divergence_is_not_weighted_by_the_ratio(case, monkeypatch):
    """TRL's is unless `use_bias_correction_kl` is False; on the policy that sampled, the value is
    the same and the gradient is not.
    """
    trainer, sampler, reference, made = case
    double(trainer, monkeypatch)
    trainer.model.load_state_dict(sampler.state_dict())
    gains, tokens = advantages(REWARDS).flatten(), sum(len(c.tokens) for c in made)
    inputs = inputs_of(made, gains, sampler, reference)
    result, mine = ours(trainer, made, gains, sampler, reference, "grpo")
    for corrected in (False, True):
        trainer.args.use_bias_correction_kl = corrected
        loss, gradient = theirs(trainer, inputs, tokens, 8, 1, "grpo")
        assert result.loss == pytest.approx(loss, rel=1e-10)
        assert apart(mine, gradient) > 0.05 if corrected else apart(mine, gradient) < 1e-10


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_rollout_shared_out_over_two_steps(case, monkeypatch, loss_type):
    """TRL divides `dapo` by the mean number of tokens of the steps; the other two have denominators
    of their own.
    """
    trainer, sampler, reference, made = case
    double(trainer, monkeypatch)
    gains = advantages(REWARDS).flatten()
    inputs, tokens = inputs_of(made, gains, sampler, reference), sum(len(c.tokens) for c in made)
    # micro batches of 2, of which an optimizer step takes two
    trainer.args.steps_per_generation = 4
    for step in (slice(0, 4), slice(4, 8)):
        part = {key: value[step] for key, value in inputs.items()}
        loss, gradient = theirs(trainer, part, tokens, 2, 2, loss_type)
        result, mine = ours(trainer, made[step], gains[step], sampler, reference, loss_type)
        own = sum(len(c.tokens) for c in made[step])
        factor = own / (tokens * 2 / 4) if loss_type == "dapo" else 1.0
        assert loss_type != "dapo" or abs(factor - 1) > 0.02
        assert loss == pytest.approx(factor * result.loss, rel=1e-10)
        assert apart(factor * mine, gradient) < 1e-6  # its denominator is float32


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_those_of_trl(trl_trainer, scale):
    rewards = torch.cat(
        [REWARDS, torch.full((1, GROUP), 0.7), torch.tensor([[1e3, 1e3, 1e3, 1e3 + 1]])]
    )
    given = iter(rewards.flatten().tolist())
    trainer = trl_trainer(
        ["ab"], lambda completions, **_: [next(given) for _ in completions], scale_rewards=scale
    )
    trainer.model.train()
    trainer.model.generation_config.max_new_tokens = 2
    found = trainer._generate_and_score_completions(
        [{"prompt": prompt} for prompt in ("a", "b", "c", "d") for _ in range(GROUP)]
    )
    mine = advantages(rewards, scale=scale == "group")
    theirs = found["advantages"].double().reshape(mine.shape)
    assert torch.allclose(mine[[0, 1, 3]], theirs[[0, 1, 3]], atol=1e-4)
    assert not mine[2].any()
    assert float(theirs[2].abs().max()) < 1e-2  # of float32's rounding of equal rewards, over 1e-4
