"""A stream of random numbers per completion: what makes a completion a function of (model, prompt,
index, seed) and of nothing else.

Token t of completion i is drawn with number t of stream (seed, prompt, i), by inverting the
distribution function of the model's softmax in float64. The numbers come from Philox, a
counter-based generator, so that a stream does not depend on which others exist, on the order of
decoding, on the slot, or on whether the completion was put aside and taken up again. [Our addition:
the paper says only that completions are the policy's own.]
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt has stood before it in the list."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        found.append(seen[key])
        seen[key] += 1
    return found


def stream(
    seed: int, prompt: Sequence[int], index: int, length: int, occurrence: int = 0
) -> np.ndarray:
    """The first `length` numbers, in [0, 1), of a completion's stream: float64 [length].

    Args:
        seed: of the rollout; in training another one each step, so that a prompt seen twice gets
            fresh numbers.
        prompt: the prompt's tokens.
        index: of the completion in its group.
        occurrence: how often the prompt has stood in the list before, so that a second one has
            other completions.
    """
    assert 0 <= index < 1 << 32
    index += occurrence << 32
    digest = hashlib.blake2b(
        repr((seed, index, tuple(map(int, prompt)))).encode(), digest_size=16
    ).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities by the inverse distribution function.

    Args:
        logits: [rows, vocabulary], any float dtype; the arithmetic is float64.
        uniforms: [rows] in [0, 1).
        temperature: 0 takes the likeliest token, and its log-probability at temperature 1.
        top_k, top_p: see `cut`.

    Returns:
        tokens [rows] int64, log-probabilities [rows] float64 under the tempered softmax of the
        whole vocabulary, which is what training computes; NaN where logits are not finite.
    """
    scaled = logits.double() if temperature == 0 else logits.double() / temperature
    if temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        chances = torch.softmax(scaled, -1)
        if top_k or top_p < 1:
            chances = cut(chances, top_k, top_p)
        cumulative = chances.cumsum_(-1)
        # Strictly above, so that a token of probability 0 is never drawn; times the total, which
        # rounding leaves beside 1.
        tokens = torch.searchsorted(
            cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True
        )[:, 0]
        tokens.clamp_(max=logits.shape[-1] - 1)
    chosen = scaled.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen - torch.logsumexp(scaled, -1)


def cut(chances: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [rows, vocabulary] of which those of unlikely tokens are 0; the others are as
    they were, so that rows no longer add up to 1.

    As in transformers and vLLM, the `top_k` likeliest tokens are kept (0: all; ties at the end are
    kept as well), and of their distribution the fewest that together have `top_p`.
    """
    if 0 < top_k < chances.shape[-1]:
        last = chances.topk(top_k, -1).values[:, -1:]
        chances = chances.masked_fill(chances < last, 0.0)
    if top_p < 1:
        ordered, places = chances.sort(-1, descending=True)
        # what the likelier tokens have, of all that is left
        before = ordered.cumsum(-1) - ordered
        dropped = before >= top_p * ordered.sum(-1, keepdim=True)
        dropped[:, 0] = False
        chances = chances.masked_fill(dropped.scatter(-1, places, dropped), 0.0)
    return chances
