"""What completions are sampled for: additions and subtractions for the small policy, and questions
for chat models.

Generated problems, so that the paper's situation can be had in minutes on a CPU, honestly:
completions of one prompt differ in length by a factor of ten, since the style is drawn with the
first tokens; lengths can be told from a short prefix and not from the prompt; answers are right
often enough for groups with mixed rewards.

    9+7-3:#13                                  at once
    9+7-3:9+7=16,16-3=13#13                    in steps
    9+7-3:?9+7=16,16-7=9,16-3=13,13+3=16#13    in steps with checks
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from shared.errors import UserError
from shared.seeding import step_seed

Style = Literal["bare", "steps", "checks"]
STYLES: tuple[Style, ...] = ("bare", "steps", "checks")
ALPHABET = "0123456789+-=,#?:"
END = "<end>"
LIMIT = 56  # new tokens that hold any solution

QUESTIONS = (  # for a chat model; short answers and long ones
    "What is the capital of France? Answer with one word.",
    "Tom has 3 apples and buys 4 more. How many apples has he?",
    "Name one prime number.",
    "What is 17 minus 8?",
    "A book costs 6 euros and a pen costs 2 euros. What do both cost?",
    "Say yes or no: is the sun a star?",
    "How many legs have two cats?",
    "Write a short sentence about rain.",
)


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
    projects.infinite_sampling.data:reward` takes.
    """
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        terms = prompt.rstrip(":").replace("-", "+-").split("+")
        found.append(float(text.rpartition("#")[2] == str(sum(map(int, terms))) and "#" in text))
    return found


def problems(count: int, seed: int, largest: int = 9) -> list[str]:
    """`count` different prompts. Raises UserError where there are not so many."""
    there = largest * 2 * largest * (1 + 2 * largest)  # with a sign each: two terms, or three
    if count > there:
        raise UserError(f"operands up to {largest} make {there} problems, not {count}")
    rng = np.random.default_rng(step_seed(seed, "problems"))
    found: dict[str, None] = {}
    while len(found) < count:
        found[prompt_of(problem(rng, largest))] = None
    return list(found)


def codes() -> dict[str, int]:
    """The number of each token."""
    return {letter: number for number, letter in enumerate([END, *ALPHABET])}


def tokenizer() -> Any:
    """A token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(codes(), unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)
