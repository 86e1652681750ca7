"""A small policy trained in place: additions and subtractions, answered at once, in steps, or in
steps with checks.

Generated problems, so that the paper's situation can be had in minutes on a CPU, honestly:
completions of one prompt differ in length by a factor of ten, since the style is drawn with the
first tokens; lengths can be told from a short prefix and not from the prompt; answers are right
often enough for groups with mixed rewards.

    9+7-3:#13                                  at once
    9+7-3:9+7=16,16-3=13#13                    in steps
    9+7-3:?9+7=16,16-7=9,16-3=13,13+3=16#13    in steps with checks

The model is a Llama of 0.25 M parameters with a token per character. It is trained once per
configuration and kept in the data cache.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from shared.paths import cache_dir
from shared.seeding import step_seed

Style = Literal["bare", "steps", "checks"]
STYLES: tuple[Style, ...] = ("bare", "steps", "checks")
ALPHABET = "0123456789+-=,#?:"
END = "<end>"
LIMIT = 56  # new tokens that hold any solution


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


def problem(rng: np.random.Generator, largest: int = 9) -> list[int]:
    """Signed terms of a problem, the first positive: two or three, of 1 to `largest`."""
    count = int(rng.integers(2, 4))
    terms = rng.integers(1, largest + 1, count) * np.where(rng.random(count) < 0.5, -1, 1)
    terms[0] = abs(terms[0])
    return [int(term) for term in terms]


def prompt_of(terms: Sequence[int]) -> str:
    """`9+7-3:`"""
    return "".join(f"{term:+d}" for term in terms).lstrip("+") + ":"


def solution(terms: Sequence[int], style: Style) -> str:
    """The right answer, written in a style."""
    if style == "bare":
        return f"#{sum(terms)}"
    parts, total = [], terms[0]
    for term in terms[1:]:
        parts.append(f"{total}{term:+d}={total + term}")
        if style == "checks":
            parts.append(f"{total + term}{-term:+d}={total}")
        total += term
    return ("?" if style == "checks" else "") + ",".join(parts) + f"#{total}"


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for a completion that ends with `#` and the right result, else 0: what `train --reward
    projects.infinite_sampling.policy:reward` takes.
    """
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        terms = prompt.rstrip(":").replace("-", "+-").split("+")
        found.append(float(text.rpartition("#")[2] == str(sum(map(int, terms))) and "#" in text))
    return found


def problems(count: int, seed: int, largest: int = 9) -> list[str]:
    """`count` different prompts."""
    rng = np.random.default_rng(step_seed(seed, "problems"))
    found: dict[str, None] = {}
    while len(found) < count:
        found[prompt_of(problem(rng, largest))] = None
    return list(found)


def tokenizer() -> Any:
    """A token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(
        models.WordLevel(
            {letter: number for number, letter in enumerate([END, *ALPHABET])}, unk_token=END
        )
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def load_policy(
    recipe: Recipe | None = None, progress: Callable[[int], Any] = range
) -> tuple[Any, Any]:
    """The model in eval mode and its tokenizer; trained first where the cache has none of this
    recipe.

    Args:
        progress: iterates over the steps of training, should there be any.
    """
    from shared.models import load_causal_lm  # which quietens the bars of transformers

    recipe = recipe or Recipe()
    folder = policy_folder(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # experiments that run side by side train it once
        if not (folder / "model.safetensors").is_file():
            model = train(recipe, progress)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".policy."))
            try:
                model.save_pretrained(temporary)
                tokenizer().save_pretrained(temporary)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return load_causal_lm(folder)


def policy_folder(recipe: Recipe) -> Path:
    """Where the policy of a recipe is kept."""
    about = json.dumps([asdict(recipe), ALPHABET, LIMIT, torch.__version__.partition("+")[0]])
    return (
        cache_dir()
        / ".trained"
        / f"infinite-sampling-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    )


def train(recipe: Recipe, progress: Callable[[int], Any] = range) -> Any:
    """Next-token prediction of solutions in the three styles, equally often."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(step_seed(recipe.seed, "policy"))
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
    model = LlamaForCausalLM(config)
    codes = {letter: number for number, letter in enumerate([END, *ALPHABET])}
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
            tokens = [codes[letter] for letter in prompt + text] + [0]
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
    return model.eval()
