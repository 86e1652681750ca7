"""Whether a model gives the same logits in rows of cache that stand at different positions as in a
plain forward: tried before a rollout, in its own number format, autocast and rope, with tokens as
few and as many as it will have.

No list of models would do. Local attention goes by many names, some position encodings look at the
whole batch, some models take no mask; all of that shows in the logits of a few rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from projects.infinite_sampling.cache import SlotCache
from shared.errors import UserError

if TYPE_CHECKING:
    from projects.infinite_sampling.sampler import Sampler

# of logits, relative to their spread: above what rounding does in deep models, far below what a
# wrong mask or position does
_TOLERANCE = {
    torch.float64: 1e-5,  # eager attention and rope compute in float32 at the best
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
_AGAIN = 4  # tokens of a completion that is taken up again

# by model and mode, the fewest and the most tokens of rows that agreed
_agreed: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, int]]] = WeakKeyDictionary()


@torch.no_grad()
def check_rows(sampler: "Sampler", prompts: Sequence[Sequence[int]]) -> None:
    """Compare rows of different lengths, one of them a completion that is taken up again and one
    idle, with plain forwards of the same tokens. A model that agreed in the same mode, with rows as
    short and as long, is not asked again.

    Args:
        prompts: tokens of each; the shortest and the longest of them, with as many new tokens as
            the sampler draws, are the lengths that are compared.

    Raises:
        UserError: logits differ, or the model raises; names the model.
    """
    if sampler.max_new_tokens < 2:
        return  # the first token is drawn from the prompt's logits
    sizes = sorted(map(len, prompts))
    least, most = sizes[0], sizes[-1] + sampler.max_new_tokens - 1
    known = _agreed.setdefault(sampler.model, {})
    before = known.get(mode := _mode(sampler), (most + 1, 0))
    if before[0] <= least and most <= before[1]:
        return
    try:
        apart, tolerance = _compared(sampler, least, most)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises at a mask or at positions
        text = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{_name(sampler)} cannot be decoded in rows that stand at different positions: it"
            f" raises {type(error).__name__}: {text[:200]}"
        ) from None
    if not apart <= tolerance:  # NaN as well
        raise UserError(
            f"{_name(sampler)} cannot be decoded in rows that stand at different positions: with"
            f" {least} to {most} tokens in a row its logits are {apart:.1e} of their spread from"
            f" those of a plain forward (rounding: {tolerance:.0e} at the most). Attention that"
            " does not look at all earlier tokens, or positions that depend on the other rows, do"
            " that; fewer --max-new-tokens may stay below where they begin"
        )
    known[mode] = min(least, before[0]), max(most, before[1])


def _compared(sampler: "Sampler", least: int, most: int) -> tuple[float, float]:
    """How far logits are apart at the most, relative to their spread, and how far they may be."""
    tokens = _tokens(sampler, most + least + _AGAIN)
    again = least + min(_AGAIN, sampler.max_new_tokens - 1)
    read = max(least, min(least + 1, again - 1))  # tokens of its prompt, beside a shorter one
    rows = [tokens[-least - 1 :], tokens[-again:], tokens[:most]]
    wanted = [
        sampler.model(input_ids=_ids(sampler, row), use_cache=False, **sampler.keep).logits[:, -1]
        for row in rows[:2]
    ]
    shorter = [rows[0][:least], rows[1][:read]]
    if sampler.together(shorter) == 2:
        prompts = sampler.prefill(shorter)[1]
    else:
        prompts = [sampler.prefill([row])[1][0] for row in shorter]
    # a plain forward of the longest row is also what its cache is filled from
    last, (whole,), _ = sampler.prefill([rows[2]])
    wanted.append(last)
    prompts.append([(keys[:, :, :-1], values[:, :, :-1]) for keys, values in whole])

    idle = len(rows)
    cache = _Watched(whole, idle + 1, most + 1)
    for row, prompt in enumerate(prompts):
        cache.load(row, prompt)
    device = sampler.device
    if again > read + 1:  # its first tokens in one forward, padded as beside a longer one
        places = torch.arange(read, again, device=device)[None]
        ids = _ids(sampler, [*rows[1][read:-1], 0])
        pad = places == again - 1
        cache.select(places.masked_fill(pad, most), most + 1, torch.tensor([1], device=device))
        sampler.forward(ids, places.masked_fill(pad, 0), cache, most + 1)
    ends = torch.tensor([[len(row) - 1] for row in rows] + [[0]], device=device)
    writes = ends.clone()
    writes[idle] = most
    cache.select(writes, most + 1)
    ids = torch.tensor([[row[-1]] for row in rows] + [[0]], device=device)
    found = sampler.forward(ids, ends, cache, most + 1)[:idle].double()
    plain = torch.cat(wanted).double()
    if not plain.isfinite().all():
        raise UserError(
            f"{_name(sampler)} gives logits that are not finite; its weights are broken"
        )
    apart = ((found - plain).square().mean(-1).sqrt() / plain.std(-1).clamp_min(1e-30)).max()
    return float(apart), max(_TOLERANCE[form] for form in (last.dtype, *cache.formats))


class _Watched(SlotCache):
    """Knows the number formats that the model computes keys and values in: autocast may stand
    around its own forward, and its outputs be widened again.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.formats: set[torch.dtype] = set()

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.formats |= {keys.dtype, values.dtype}
        return super().exchange(layer, keys, values)


def _mode(sampler: "Sampler") -> tuple[Any, ...]:
    device = sampler.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return device, sampler.model.dtype, autocast, sampler.model.config._attn_implementation


def _tokens(sampler: "Sampler", count: int) -> list[int]:
    """Different ones, as rows of equal tokens would agree whatever they look at; none that means
    padding, an image or the like to the model.
    """
    config = sampler.model.config.get_text_config()
    special = {value for key, value in sampler.model.config.to_dict().items() if "token" in key
               and isinstance(value, int)}  # fmt: skip
    plain = [token for token in range(min(config.vocab_size, 4096)) if token not in special]
    plain = plain or [0]
    drawn = np.random.default_rng(0).integers(0, len(plain), count)
    return [plain[place] for place in drawn]


def _ids(sampler: "Sampler", row: Sequence[int]) -> Tensor:
    return torch.tensor([list(row)], device=sampler.device)


def _name(sampler: "Sampler") -> str:
    return f"{type(sampler.model).__name__} ({sampler.model.config._attn_implementation} attention)"
