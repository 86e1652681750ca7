"""A stream of random numbers per completion: what makes a completion a function of (model, prompt,
index, seed) and of nothing else.

Token t of completion i is drawn with number t of stream (seed, prompt, i), by inverting the
distribution function of the model's softmax in float64. The numbers come from Philox, a
counter-based generator, so that a stream does not depend on which others exist, on the order of
decoding, on the slot, or on whether the completion was put aside and taken up again. [Our addition:
the paper says only that completions are the policy's own.]
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, prompt: Sequence[int], index: int, length: int) -> np.ndarray:
    """The first `length` numbers, in [0, 1), of a completion's stream: float64 [length].

    Args:
        seed: of the rollout; in training another one each step, so that a prompt seen twice gets
            fresh numbers.
        prompt: the prompt's tokens. Two equal prompts have equal streams.
        index: of the completion in its group.
    """
    digest = hashlib.blake2b(
        repr((seed, index, tuple(map(int, prompt)))).encode(), digest_size=16
    ).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(length)


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities by the inverse distribution function.

    Args:
        logits: [rows, vocabulary], any float dtype; the arithmetic is float64.
        uniforms: [rows] in [0, 1).
        temperature: 0 takes the likeliest token, and its log-probability at temperature 1.

    Returns:
        tokens [rows] int64, log-probabilities [rows] float64 (of the distribution drawn from).
    """
    scaled = logits.double() if temperature == 0 else logits.double() / temperature
    if temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        cumulative = torch.softmax(scaled, -1).cumsum_(-1)
        # Strictly above, so that a token of probability 0 is never drawn; times the total, which
        # rounding leaves beside 1.
        tokens = torch.searchsorted(
            cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True
        )[:, 0]
        tokens.clamp_(max=logits.shape[-1] - 1)
    chosen = scaled.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen - torch.logsumexp(scaled, -1)
