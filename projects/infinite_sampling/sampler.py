"""A model as rollouts drive it: its forwards over rows of cache, what a completion is drawn with,
and when it ends.
"""

import inspect
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from projects.infinite_sampling.cache import Prefix
from projects.infinite_sampling.rollout import Finish
from shared.errors import UserError

# tokens decoded beyond the longest stop string's bytes, for what a tokenizer strips
_STOP_MARGIN = 8
_PREFILL_TOKENS = 4096  # of prompts that one forward reads, padding counted


class Sampler:
    """A model and how completions are drawn from it.

    Args:
        model: a decoder of transformers, in eval mode, that fills a key-value cache. Whether its
            rows may stand at different positions is tried before a rollout (`selfcheck`).
        eos: tokens that end a completion.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        top_p: draw from the fewest tokens that together have this probability.
        seed: of the streams of random numbers.
        stop: strings that end a completion once its text holds one; they need `tokenizer`.
        fixed_shape: see `engine`.

    Raises:
        UserError: a model that this cannot drive.
    """

    def __init__(
        self,
        model: Any,
        eos: Collection[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        fixed_shape: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError("a completion needs at least 1 new token")
        if not 0 <= temperature < math.inf:
            raise UserError(f"a temperature of {temperature}; it must be 0 or above, and finite")
        if top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"top_k {top_k} and top_p {top_p}: the first must be 0 (all tokens) or above, the"
                " second above 0 and at most 1"
            )
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if "" in stop:
            raise UserError("an empty stop string would end every completion at once")
        _check_model(model)
        self.model, self.eos, self.max_new_tokens = model, frozenset(eos), max_new_tokens
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.seed, self.fixed_shape = seed, fixed_shape
        self.stop, self.tokenizer = tuple(stop), tokenizer
        self.device = next(model.parameters()).device
        self.context = getattr(model.config, "max_position_embeddings", None)
        # which adds its mask, where sdpa takes true and false
        self.additive = model.config._attn_implementation == "eager"
        self.keep = {"logits_to_keep": 1} if can_keep(model) else {}
        self._stop_window = (
            max((len(text.encode()) for text in self.stop), default=0) + _STOP_MARGIN
        )

    def forward(self, ids: Tensor, positions: Tensor, cache: Any, width: int) -> Tensor:
        """Logits [rows, vocabulary] of the last of the tokens `ids` [rows, new], which stand at
        `positions` and see what is before them.
        """
        mask = torch.arange(width, device=self.device) <= positions[:, None, :, None]
        if self.additive:
            lowest = torch.finfo(self.model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(
                ~mask, lowest
            )
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self.keep,
        )
        return output.logits[:, -1]

    def together(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many of the prompts, from the first on, one forward reads."""
        if self.fixed_shape or not self.keep:  # logits of whole prompts would be large
            return 1
        longest = 0
        for count, tokens in enumerate(prompts):
            longest = max(longest, len(tokens))
            if count and longest * (count + 1) > _PREFILL_TOKENS:
                return count
        return len(prompts)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Prefix], list[int]]:
        """Read prompts in one forward, padded on the right, where no token of a causal model sees
        the padding.

        Returns:
            logits [prompts, vocabulary] after each; the keys and values of each; where the last
            state of each stands among the states that logits were made from.
        """
        cache = DynamicCache()
        last = [len(tokens) - 1 for tokens in prompts]
        ids = torch.zeros(len(prompts), max(last) + 1, dtype=torch.int64)
        for row, tokens in enumerate(prompts):
            ids[row, : len(tokens)] = torch.tensor(list(tokens))
        kept = sorted(set(last)) if self.keep else list(range(ids.shape[1]))
        keep = {"logits_to_keep": torch.tensor(kept, device=self.device)} if self.keep else {}
        try:
            logits = self.model(
                input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **keep
            ).logits
            whole = [(layer.keys, layer.values) for layer in cache.layers]
            layers = self.model.config.get_text_config().num_hidden_layers
            if len(whole) != layers or whole[0][0].shape[2] != ids.shape[1]:
                raise AttributeError
        except (TypeError, AttributeError):
            raise UserError(
                f"{type(self.model).__name__} fills no key-value cache; rows cannot be decoded one"
                " token at a time"
            ) from None
        at = [kept.index(place) for place in last]
        if len(prompts) == 1:
            return logits[:, -1], [whole], at
        prefixes = [  # copies, so that each is freed on its own
            [
                (
                    keys[row : row + 1, :, : place + 1].clone(),
                    values[row : row + 1, :, : place + 1].clone(),
                )
                for keys, values in whole
            ]
            for row, place in enumerate(last)
        ]
        return logits[range(len(prompts)), at], prefixes, at

    def ended(self, tokens: list[int], limit: int) -> Finish | None:
        """Why a completion ends here, if it does."""
        if tokens[-1] in self.eos:
            return "eos"
        if self.stop:
            text = self.tokenizer.decode(tokens[-self._stop_window :])
            if any(stop in text for stop in self.stop):
                return "stop"
        return "length" if len(tokens) >= limit else None


def can_keep(model: Any) -> bool:
    """Whether the model can leave out logits that nobody asks for; PEFT hands on what it does not
    know.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _check_model(model: Any) -> None:
    """Refuse what is no decoder to sample from; whether it can be driven shows in `selfcheck`."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder and a decoder; rollouts need a decoder alone")
    if model.training:
        raise UserError(
            f"{name} is in training mode, whose dropout would change completions; call model.eval()"
            " first"
        )


def prefix_features(model: Any, states: Tensor, last: Sequence[int]) -> Tensor:
    """What a hidden-state predictor sees, float32 [jobs, 2 hidden size]: the state that produced
    the last token of the prefix, and that token's embedding. No forward of its own is needed for
    it.
    """
    embeddings = model.get_input_embeddings()(torch.tensor(list(last), device=states.device))
    return torch.cat([states.float(), embeddings.float()], -1).cpu()
