"""A model as rollouts drive it: its forwards over rows of cache, what a completion is drawn with,
and when it ends.
"""

import inspect
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


class Sampler:
    """A model and how completions are drawn from it.

    Args:
        model: a decoder of transformers with sdpa or eager attention that looks at all earlier
            tokens, in eval mode.
        eos: tokens that end a completion.
        max_new_tokens: tokens of a completion at most.
        temperature: of the softmax; 0 takes the likeliest token.
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
        seed: int = 0,
        stop: Sequence[str] = (),
        tokenizer: Any = None,
        fixed_shape: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError("a completion needs at least 1 new token")
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        if "" in stop:
            raise UserError("an empty stop string would end every completion at once")
        _check_model(model)
        self.model, self.eos, self.max_new_tokens = model, frozenset(eos), max_new_tokens
        self.temperature, self.seed, self.fixed_shape = temperature, seed, fixed_shape
        self.stop, self.tokenizer = tuple(stop), tokenizer
        self.device = next(model.parameters()).device
        self.context = getattr(model.config, "max_position_embeddings", None)
        # which adds its mask, where sdpa takes true and false
        self.additive = model.config._attn_implementation == "eager"
        self._keep = {"logits_to_keep": 1} if can_keep(model) else {}
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
            **self._keep,
        )
        return output.logits[:, -1]

    def prefill(self, tokens: Sequence[int]) -> tuple[Tensor, Prefix]:
        """Logits [1, vocabulary] after a prompt, and its keys and values."""
        cache = DynamicCache()
        ids = torch.tensor([list(tokens)], device=self.device)
        try:
            logits = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, **self._keep
            ).logits[:, -1]
            prefix = [(layer.keys, layer.values) for layer in cache.layers]
            if len(prefix) != self.model.config.get_text_config().num_hidden_layers or prefix[0][
                0
            ].shape[2] != len(tokens):
                raise AttributeError
        except (TypeError, AttributeError):
            raise UserError(
                f"{type(self.model).__name__} fills no key-value cache; rows cannot be decoded one"
                " token at a time"
            ) from None
        return logits, prefix

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
    """Refuse what rows at different positions would get wrong. Whether there is a cache at all
    shows in the first forward.
    """
    config, name = model.config, type(model).__name__
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder and a decoder; rollouts need a decoder alone")
    if model.training:
        raise UserError(
            f"{name} is in training mode, whose dropout would change completions; call model.eval()"
            " first"
        )
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        raise UserError(
            f"{name} has layers that do not look at all earlier tokens (a sliding window?), which"
            " rows of this cache do"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UserError(
            f"attention '{config._attn_implementation}' takes no mask of rows at different"
            " positions; load the model with sdpa"
        )


def prefix_features(model: Any, states: Tensor, last: Sequence[int]) -> Tensor:
    """What a hidden-state predictor sees, float32 [jobs, 2 hidden size]: the state that produced
    the last token of the prefix, and that token's embedding. No forward of its own is needed for
    it.
    """
    embeddings = model.get_input_embeddings()(torch.tensor(list(last), device=states.device))
    return torch.cat([states.float(), embeddings.float()], -1).cpu()
