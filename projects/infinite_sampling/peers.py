"""What one would use otherwise: `generate` of transformers, for the whole group or in chunks, and its continuous batching.

Their random numbers are one stream for a batch, so that their completions depend on the chunks; their distribution is the same.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import torch


def generate(model: Any, prompt: Sequence[int], group: int, rows: int, limit: int, eos: int, seed: int = 0) -> list[int]:
    """Lengths of a group's completions by `model.generate`, `rows` at a time. The cache concatenates, and copies the prompt for each
    row."""
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    lengths: list[int] = []
    with torch.no_grad():
        while len(lengths) < group:
            made = model.generate(
                torch.tensor([list(prompt)], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=min(rows, group - len(lengths)),
                max_new_tokens=limit,
                eos_token_id=eos,
                pad_token_id=eos,
            )[:, len(prompt) :]
            ended = made == eos
            lengths += torch.where(ended.any(-1), ended.int().argmax(-1) + 1, made.shape[1]).tolist()
    return lengths


def generate_batch(model: Any, prompt: Sequence[int], group: int, rows: int, limit: int, eos: int, seed: int = 0) -> list[int]:
    """Lengths of a group's completions by the continuous batching of transformers, in a cache of about `rows` sequences.

    Left to itself it reserves nearly all free memory; here it gets as many blocks as the rows need.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = 32
    blocks = rows * -(-(len(prompt) + limit) // page) + 1
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=limit,
        eos_token_id=eos,
        pad_token_id=eos,
        num_return_sequences=group,
    )
    batching = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=blocks,
        max_batch_tokens=max(rows, len(prompt)) + rows,
        max_requests_per_batch=rows,
        auto_switch_to_flash=False,
        use_cuda_graph=False,
        use_async_batching=False,
        seed=seed,
    )
    attention = model.config._attn_implementation
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            made = model.generate_batch([list(prompt)], generation_config=sampling, continuous_batching_config=batching, warmup=False)
    finally:
        logging.disable(level)
        model.set_attn_implementation(attention)  # it leaves its own behind
    return [len(output.generated_tokens) for output in made.values()]
