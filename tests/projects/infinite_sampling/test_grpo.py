"""The gradient of micro batches is that of the whole group; the loss against a naive one by
autodiff, token by token.
"""

import copy
import math

import pytest
import torch

from projects.infinite_sampling.engine import Engine
from projects.infinite_sampling.grpo import (
    Batch,
    advantages,
    backward,
    old_logprobs,
    reference_of,
    token_logprobs,
)
from projects.infinite_sampling.rollout import Schedule

PROMPTS = [[3, 1, 4], [2, 7, 1, 8, 2]]
GROUP, LIMIT = 6, 12
LOSSES = ("grpo", "dapo", "dr_grpo")


@pytest.fixture(scope="module")
def completions(llama):
    made = (
        Engine(llama, [0], LIMIT, seed=7).run(PROMPTS, GROUP, Schedule("continuous", 4)).completions
    )
    assert len({len(c.tokens) for c in made}) > 3
    return made


@pytest.fixture(scope="module")
def gains():
    rewards = torch.tensor([[1.0, 0, 0, 1, 0.5, 0], [0, 0, 1, 0, 0, 0]])
    return advantages(rewards).flatten()


def gradient(model, *args, **kwargs):
    model = copy.deepcopy(model)
    result = backward(model, *args, **kwargs)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), result


def moved(model):
    """The policy after a while: ratios are not 1."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def naive_loss(model, completions, gains, old, loss_type, eps, beta, frozen):
    """One completion and one token at a time."""
    terms, total_tokens = [], sum(len(c.tokens) for c in completions)
    for c, gain, before in zip(completions, gains.tolist(), old, strict=True):
        prompt = PROMPTS[c.prompt]
        sequence = torch.tensor([prompt + c.tokens])
        mine = torch.log_softmax(model(input_ids=sequence).logits[0], -1)
        with torch.no_grad():
            theirs = torch.log_softmax(frozen(input_ids=sequence).logits[0], -1)
        tokens = []
        for t, token in enumerate(c.tokens):
            at = len(prompt) + t - 1
            ratio = torch.exp(mine[at, token] - before[t])
            clipped = min(max(ratio.item(), 1 - eps), 1 + eps)
            surrogate = (
                ratio * gain
                if (ratio * gain).item() <= clipped * gain
                else torch.tensor(clipped * gain, dtype=torch.float64)
            )
            kl = (
                torch.exp(theirs[at, token] - mine[at, token])
                - (theirs[at, token] - mine[at, token])
                - 1
            )
            tokens.append(surrogate - beta * kl)
        weight = {
            "grpo": 1 / len(c.tokens) / len(completions),
            "dapo": 1 / total_tokens,
            "dr_grpo": 1 / len(completions) / LIMIT,
        }[loss_type]
        terms.append(-weight * sum(tokens))
    return sum(terms)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_gradient_is_that_of_a_naive_loss(llama, completions, gains, loss_type):
    policy, eps, beta = moved(llama), 0.1, 0.3
    old = old_logprobs(llama, PROMPTS, completions, 5)
    for c, before in zip(completions, old, strict=True):
        assert before.tolist() == pytest.approx(c.logprobs, abs=1e-10)
    found, result = gradient(
        policy, PROMPTS, completions, gains, LIMIT, micro_batch=5, loss_type=loss_type, eps=eps,
        beta=beta,
        reference=reference_of(policy, frozen=llama), old=old,
    )  # fmt: skip
    assert 0 < result.clipped < 1
    loss = naive_loss(policy, completions, gains, old, loss_type, eps, beta, llama)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert result.loss == pytest.approx(loss.item(), abs=1e-10)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_add_up_to_the_whole(llama, completions, gains, loss_type):
    whole, result = gradient(
        llama, PROMPTS, completions, gains, LIMIT, micro_batch=len(completions), loss_type=loss_type
    )
    assert float(whole.norm()) > 0
    assert result.mismatch < 1e-10
    assert result.clipped == 0
    for micro in (1, 5, 8):
        part, other = gradient(
            llama, PROMPTS, completions, gains, LIMIT, micro_batch=micro, loss_type=loss_type
        )
        assert float((part - whole).norm() / whole.norm()) <= 1e-12
        assert other.loss == pytest.approx(result.loss, abs=1e-12)


def test_the_micro_batchs_own_denominator_or_advantages_would_be_wrong(llama, completions, gains):
    """What the module warns of is far from the truth here, so that the test above can see it."""
    whole, _ = gradient(llama, PROMPTS, completions, gains, LIMIT, micro_batch=12, loss_type="dapo")
    parts = [
        gradient(
            llama,
            PROMPTS,
            completions[i : i + 4],
            gains[i : i + 4],
            LIMIT,
            micro_batch=4,
            loss_type="dapo",
        )[0]
        for i in (0, 4, 8)
    ]
    assert float((sum(parts) / 3 - whole).norm() / whole.norm()) > 0.01
    rewards = torch.tensor([[1.0, 0, 0, 1, 0.5, 0], [0, 0, 1, 0, 0, 0]])
    local = advantages(rewards.reshape(4, 3)).flatten()
    other, _ = gradient(llama, PROMPTS, completions, local, LIMIT, micro_batch=12)
    grpo, _ = gradient(llama, PROMPTS, completions, gains, LIMIT, micro_batch=12)
    assert float((other - grpo).norm() / grpo.norm()) > 0.1


def test_advantages_are_the_groups():
    rewards = torch.tensor([[1.0, 2, 3, 4], [0.1, 0.1, 0.1, 0.1]])
    found = advantages(rewards)
    deviation = math.sqrt(sum((x - 2.5) ** 2 for x in (1, 2, 3, 4)) / 3)
    assert found[0].tolist() == pytest.approx(
        [(x - 2.5) / (deviation + 1e-4) for x in (1, 2, 3, 4)]
    )
    assert found[1].tolist() == [0, 0, 0, 0]
    for count in (3, 6, 7):  # three times 0.1, over three, is not 0.1
        assert not advantages(torch.full((1, count), 0.1, dtype=torch.float64)).any()
    assert advantages(rewards, scale=False)[0].tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert advantages(torch.tensor([[3.0]])).tolist() == [[0.0]]


def test_equal_rewards_give_no_gradient_at_all(llama, completions):
    found, result = gradient(
        llama,
        PROMPTS,
        completions,
        advantages(torch.full((2, 6), 0.7)).flatten(),
        LIMIT,
        micro_batch=4,
    )
    assert not found.any()
    assert result.loss == 0


def test_temperature_is_that_of_the_sampler(llama):
    made = (
        Engine(llama, [0], LIMIT, seed=3, temperature=0.7)
        .run(PROMPTS, 3, Schedule("micro", 2))
        .completions
    )
    batch = Batch.of(PROMPTS, made)
    with torch.no_grad():
        found = token_logprobs(llama, batch, 0.7)
    assert float((found - batch.sampled)[batch.mask].abs().max()) < 1e-10
    assert int(batch.mask.sum()) == sum(len(c.tokens) for c in made)


def test_logits_are_looked_at_in_pieces(llama, completions, monkeypatch):
    batch = Batch.of(PROMPTS, completions)
    whole = token_logprobs(llama, batch)
    monkeypatch.setattr("projects.infinite_sampling.grpo._LOGITS_BYTES", 1)
    assert torch.equal(token_logprobs(llama, batch), whole)


def test_the_reference_of_an_adapter_is_the_model_without_it(helpers, completions):
    from shared.models import add_lora

    base = helpers.make()
    wanted = token_logprobs(base, Batch.of(PROMPTS, completions)).detach()
    model = add_lora(helpers.make(), 2, 4, None, "somewhere")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    batch = Batch.of(PROMPTS, completions)
    assert torch.allclose(reference_of(model)(batch), wanted)
    assert not torch.allclose(token_logprobs(model, batch), wanted)
    with pytest.raises(ValueError, match="reference"):
        backward(model, PROMPTS, completions, torch.ones(12), LIMIT, micro_batch=4, beta=0.1)
