"""A small policy trained in place, to which completions, rewards and their lengths mean something.

A Llama of 0.25 M parameters with a token per character, trained on the solutions of `data`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from projects.infinite_sampling.data import (
    ALPHABET,
    STYLES,
    codes,
    problem,
    prompt_of,
    solution,
    tokenizer,
)
from shared.seeding import step_seed


@dataclass(frozen=True)
class Recipe:
    """How the policy is trained: `layers`, `hidden` size and `heads` of the model; `steps` of
    `rows` solutions each at a peak rate of `lr`; the `largest` operand.
    """

    layers: int
    hidden: int
    heads: int
    steps: int
    rows: int
    lr: float
    largest: int
    seed: int


def build(layers: int, hidden: int, heads: int, seed: int = 0) -> Any:
    """The model with first weights, a function of the seed; torch's own stream of random numbers
    stays where it is.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "policy"))
        return LlamaForCausalLM(config)


def train(
    recipe: Recipe, progress: Callable[[int], Any] = range
) -> tuple[dict[str, Tensor], float]:
    """Next-token prediction of solutions in the three styles, equally often.

    Args:
        progress: iterates over the steps.

    Returns:
        The trained weights by name, and the loss of the last step in nats per token.
    """
    model = build(recipe.layers, recipe.hidden, recipe.heads, recipe.seed)
    number_of = codes()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1
    )
    rng = np.random.default_rng(step_seed(recipe.seed, "data"))
    model.train()
    for _ in progress(recipe.steps):
        pairs = [
            (prompt_of(terms), solution(terms, STYLES[int(rng.integers(3))]))
            for terms in (problem(rng, recipe.largest) for _ in range(recipe.rows))
        ]
        longest = max(len(p) + len(s) + 1 for p, s in pairs)
        ids = torch.zeros(recipe.rows, longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, text) in enumerate(pairs):
            tokens = [number_of[letter] for letter in prompt + text] + [0]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, len(prompt) : len(tokens)] = ids[row, len(prompt) : len(tokens)]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return weights, loss.item()


def policy_of(
    weights: Mapping[str, Tensor], layers: int, hidden: int, heads: int
) -> tuple[Any, Any]:
    """The model with trained weights in eval mode, and its tokenizer."""
    model = build(layers, hidden, heads)
    model.load_state_dict(dict(weights))
    return model.eval(), tokenizer()
