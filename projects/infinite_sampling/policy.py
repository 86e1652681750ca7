"""A small policy trained in place, to which completions, rewards and their lengths mean something.

A Llama of 0.25 M parameters with a token per character, trained on the solutions of `data`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from projects.infinite_sampling.data import (
    ALPHABET,
    LIMIT,
    STYLES,
    codes,
    problem,
    prompt_of,
    solution,
    tokenizer,
)
from shared.paths import cache_dir
from shared.seeding import step_seed


@dataclass(frozen=True)
class Recipe:
    """How the policy is trained. Another recipe is another checkpoint.

    Chosen for training time alone: of operands up to 19 with 0.6 M parameters, 500 steps take three
    times as long and leave 11 % right.
    """

    layers: int = 2
    hidden: int = 96
    heads: int = 4
    steps: int = 600
    rows: int = 32
    lr: float = 5e-3
    largest: int = 9  # operand
    seed: int = 0


def build(recipe: Recipe) -> Any:
    """The model with first weights, a function of the recipe's seed; torch's own stream of random
    numbers stays where it is.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(recipe.seed, "policy"))
        return LlamaForCausalLM(config)


def train(recipe: Recipe, progress: Callable[[int], Any] = range) -> dict[str, Tensor]:
    """The trained weights: next-token prediction of solutions in the three styles, equally often.

    Args:
        progress: iterates over the steps.
    """
    model = build(recipe)
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
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def load_policy(recipe: Recipe, weights: Path) -> tuple[Any, Any]:
    """The model of a recipe in eval mode with the weights of a safetensors file, and its
    tokenizer.
    """
    model = build(recipe)
    model.load_state_dict(load_file(weights))
    return model.eval(), tokenizer()


def cached_weights(recipe: Recipe, progress: Callable[[int], Any] = range) -> Path:
    """The safetensors file of a recipe's weights in the cache; trained first where there is none.

    Args:
        progress: iterates over the steps of training, should there be any.
    """
    about = json.dumps([asdict(recipe), ALPHABET, LIMIT, torch.__version__.partition("+")[0]])
    digest = hashlib.sha256(about.encode()).hexdigest()[:16]
    file = cache_dir() / ".trained" / f"infinite-sampling-{digest}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # experiments that run side by side train it once
        if not file.is_file():
            partial = file.with_name(f".{file.name}.part")
            save_file(train(recipe, progress), partial)
            os.replace(partial, file)
    return file
