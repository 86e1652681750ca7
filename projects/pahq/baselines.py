"""What PAHQ is compared with: plain ACDC, and the public release's forward.

Plain ACDC is written from the method's description on PyTorch hooks: every evaluation runs the
whole model of transformers, and hooks on its modules give each receiver its own input. It shares no
code with the engine, which is tested against it and timed beside it.

What it does not do: restart from a layer, skip what an edge does not reach, unembed only the scored
positions, or share the product of receivers with equal inputs. Within those terms it is not made
slow: sums over senders are matrix products, and each head multiplies by its own part of the weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.pahq.engine import Engine, Metric, Trial


@dataclass(frozen=True)
class Parts:
    """Where the modules of a family are.

    Attributes:
        projections: of an attention block: one fused module, or those of Q, K and V.
    """

    blocks: Any
    final_norm: nn.Module
    attention_norm: str
    projections: tuple[str, ...]
    out: str
    mlp_norm: str
    mlp_out: str
    heads: int
    kv_heads: int
    width: int
    interleaved: bool = False  # a fused projection goes head by head, not letter by letter
    parallel: bool = False


def parts_of(model: Any) -> Parts:
    """Of a model of transformers: Llama, GPT-2, GPT-NeoX or OPT."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    common = {"heads": heads, "kv_heads": heads, "width": width}
    if config.model_type == "gpt2":
        inner = model.transformer
        return Parts(
            inner.h, inner.ln_f, "ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", "mlp.c_proj",
            **common,
        )  # fmt: skip
    if config.model_type == "gpt_neox":
        inner = model.gpt_neox
        return Parts(
            inner.layers, inner.final_layer_norm, "input_layernorm", ("attention.query_key_value",),
            "attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h", **common,
            interleaved=True, parallel=config.use_parallel_residual,
        )  # fmt: skip
    letters = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
    if config.model_type == "opt":
        inner = model.model.decoder
        return Parts(
            inner.layers, inner.final_layer_norm, "self_attn_layer_norm", letters,
            "self_attn.out_proj", "final_layer_norm", "fc2", **common,
        )  # fmt: skip
    inner = model.model
    return Parts(
        inner.layers, inner.norm, "input_layernorm", letters, "self_attn.o_proj",
        "post_attention_layernorm", "mlp.down_proj",
        **(common | {"kv_heads": config.num_key_value_heads}),
    )  # fmt: skip


class Hooked:
    """A model whose receivers can be given inputs of their own.

    Senders: the embedding, then of each layer its heads and its MLP. Receivers: of each layer Q of
    each head, K and V of each key-value head, the MLP; then the output.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.parts = model, parts_of(model)
        parts = self.parts
        self.senders = 1 + len(parts.blocks) * (parts.heads + 1)
        self.readers = parts.heads + 2 * parts.kv_heads + 1
        self.receivers = len(parts.blocks) * self.readers + 1
        self._weights: dict[nn.Module, Tensor] = {}

    def run(self, tokens: Tensor, mask: np.ndarray, corrupted: Tensor | None) -> "Patched":
        """Logits [B, T, vocabulary] and what the senders wrote [S, B, T, D] in this run, with
        c = `corrupted` (zero where None) on the edges that `mask` [R, S] lacks.
        """
        state = _State(self, torch.from_numpy(mask), corrupted)
        hooks = list(state.hooks())
        try:
            logits = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return Patched(logits, torch.stack(state.written))

    def full(self) -> np.ndarray:
        """All edges, bool [R, S]."""
        parts = self.parts
        mask = np.zeros((self.receivers, self.senders), dtype=bool)
        for layer in range(len(parts.blocks)):
            before = 1 + layer * (parts.heads + 1)
            first = layer * self.readers
            mask[first : first + self.readers, :before] = True
            if not parts.parallel:
                mask[first + self.readers - 1, before : before + parts.heads] = True
        mask[-1] = True
        return mask

    def weight(self, module: nn.Module) -> Tensor:
        """[out, in] of a linear layer, also of GPT-2's, which keeps it the other way."""
        if module not in self._weights:
            weight = module.weight
            assert isinstance(weight, Tensor)
            turned = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
            self._weights[module] = turned.detach()
        return self._weights[module]


@dataclass(frozen=True)
class Patched:
    """Of one run."""

    logits: Tensor
    written: Tensor


class _State:
    """One run: what senders have written so far, and the hooks that read and write it."""

    def __init__(self, hooked: Hooked, mask: Tensor, corrupted: Tensor | None) -> None:
        self.hooked, self.mask, self.corrupted = hooked, mask, corrupted
        self.written: list[Tensor] = []
        self.bias: Tensor | float = 0.0  # of the output projections so far
        self.inputs: Tensor | None = None  # of the attention of the layer that is running

    def hooks(self) -> Any:
        parts = self.hooked.parts
        yield parts.blocks[0].register_forward_pre_hook(self._embedded, with_kwargs=True)
        for layer, block in enumerate(parts.blocks):
            norm = block.get_submodule(parts.attention_norm)
            for number, name in enumerate(parts.projections):
                hook = partial(self._projected, layer, norm, number)
                yield block.get_submodule(name).register_forward_hook(hook)
            yield block.get_submodule(parts.out).register_forward_pre_hook(
                partial(self._mixed, layer)
            )
            yield block.get_submodule(parts.mlp_norm).register_forward_pre_hook(
                partial(self._before_mlp, layer)
            )
            yield block.get_submodule(parts.mlp_out).register_forward_hook(self._after_mlp)
        yield parts.final_norm.register_forward_pre_hook(self._before_output)

    def input(self, receivers: slice, senders: int, bias: Tensor | float) -> Tensor:
        """sum_s c_s + sum_s g (o_s - c_s) over the first `senders`, [n, B, T, D]."""
        own = torch.stack(self.written[:senders])
        rows = self.mask[receivers, :senders].to(own)
        if self.corrupted is None:
            return torch.tensordot(rows, own, 1) + bias
        c = self.corrupted[:senders]
        return torch.tensordot(rows, own - c, 1) + c.sum(0) + bias

    def _embedded(self, module: Any, args: Any, kwargs: Any) -> None:
        self.written.append(args[0] if args else kwargs["hidden_states"])

    def _projected(
        self, layer: int, norm: nn.Module, number: int, module: Any, args: Any, output: Tensor
    ) -> Tensor:
        """The output of a projection, each head's slice from its own input."""
        parts = self.hooked.parts
        weight, width = self.hooked.weight(module), parts.width
        senders = 1 + layer * (parts.heads + 1)
        counts = (parts.heads, parts.kv_heads, parts.kv_heads)
        letters = range(3) if len(parts.projections) == 1 else (number,)
        first = layer * self.hooked.readers
        if number == 0:
            self.inputs = self.input(slice(first, first + sum(counts)), senders, self.bias)
        assert self.inputs is not None
        result = torch.empty_like(output)
        for letter in letters:
            for head in range(counts[letter]):
                if len(parts.projections) > 1:
                    place = head
                elif parts.interleaved:
                    place = 3 * head + letter
                else:
                    place = letter * parts.heads + head
                rows = slice(place * width, (place + 1) * width)
                x = norm(self.inputs[sum(counts[:letter]) + head])
                bias = None if module.bias is None else module.bias[rows]
                result[..., rows] = F.linear(x, weight[rows], bias)
        return result

    def _mixed(self, layer: int, module: Any, args: Any) -> None:
        """What each head writes for its mixed values."""
        parts = self.hooked.parts
        weight = self.hooked.weight(module)
        for head in range(parts.heads):
            columns = slice(head * parts.width, (head + 1) * parts.width)
            self.written.append(F.linear(args[0][..., columns], weight[:, columns]))
        self.before = self.bias  # a parallel MLP reads the stream before the attention
        if module.bias is not None:
            self.bias = self.bias + module.bias

    def _before_mlp(self, layer: int, module: Any, args: Any) -> Tensor:
        parts = self.hooked.parts
        senders = 1 + layer * (parts.heads + 1) + (0 if parts.parallel else parts.heads)
        receiver = (layer + 1) * self.hooked.readers - 1
        bias = self.before if parts.parallel else self.bias
        return self.input(slice(receiver, receiver + 1), senders, bias).view(args[0].shape)

    def _after_mlp(self, module: Any, args: Any, output: Tensor) -> None:
        self.written.append(output.view(self.written[0].shape))

    def _before_output(self, module: Any, args: Any) -> Tensor:
        return self.input(slice(-1, None), self.hooked.senders, self.bias)[0]


def plain_search(
    model: Any,
    clean: Tensor,
    corrupted: Tensor,
    metric: Callable[[Tensor], float],
    threshold: float,
    receivers: list[int] | None = None,
) -> tuple[np.ndarray, int]:
    """ACDC as described: from the last receiver to the first, each edge from the first sender to
    the last, a forward pass of the whole model for each.

    Args:
        metric: of logits [B, T, vocabulary].
        receivers: the order; where None, the last first.

    Returns:
        The mask [R, S] and the number of forward passes.
    """
    hooked = Hooked(model)
    with torch.no_grad():
        mask = hooked.full()
        c = hooked.run(corrupted, mask, None).written
        now = metric(hooked.run(clean, mask, c).logits)
        runs = 1
        for receiver in receivers or range(hooked.receivers - 1, -1, -1):
            for sender in np.flatnonzero(mask[receiver]):
                mask[receiver, sender] = False
                value = metric(hooked.run(clean, mask, c).logits)
                runs += 1
                if value - now < threshold:
                    now = value
                else:
                    mask[receiver, sender] = True
    return mask, runs


class Released(Engine):
    """The public release's forward as far as its graph goes: the Q, K and V of every head of a
    layer read head 0's input. So an edge into another head does nothing, and one into head 0 acts
    on all.
    (Its unscaled cast is `Policy(scale="none")`. It also stores products in e4m3 and takes the
    reference from the low model; these are left out.)
    """

    def _shared(self, receiver: int) -> int:
        """Head 0's receiver of the same letter."""
        graph = self.graph
        layer = graph.layer_of_receiver(receiver)
        if receiver == graph.out or receiver == graph.mlp_receiver(layer):
            return receiver
        place = receiver - graph.first_reader(layer)
        if place < graph.heads:
            return graph.q(layer, 0)
        return (graph.k if place < graph.heads + graph.kv_heads else graph.v)(layer, 0)

    def _inputs(self, receivers: Sequence[int], wave: Any) -> tuple[Tensor, list[int]]:
        return super()._inputs([self._shared(receiver) for receiver in receivers], wave)

    def _rests(self, sender: int, own: dict[int, Tensor]) -> bool:
        return False

    def _needed(self) -> np.ndarray:
        return np.ones(self.graph.senders, dtype=bool)

    def trial(self, receiver: int, senders: Sequence[Sequence[int]], metric: Metric) -> Trial:
        """As `Engine.trial`, by the whole forward."""
        self.evaluations += len(senders)
        kept, deltas, values = self.mask, self.deltas.clone(), []
        for removed in senders:
            self.mask = kept.copy()
            self.mask[receiver, list(removed)] = False
            self._recompute()
            values.append(metric(self.logits()[None])[0])
        new = self.deltas.clone()[:, None]
        self.mask, self.deltas = kept, deltas
        self._recompute()
        return Trial(torch.stack(values), list(range(1, self.graph.senders)), new[1:])
