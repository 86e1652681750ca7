"""Adapters: what each family of transformers' decoders calls the parts of a `Decoder`.

One function for a family, which reads the model's own modules and rewrites none. Whether it reads
them rightly is never taken on trust: `engine.check` compares with the model's own logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from projects.pahq.decoder import Apply, Decoder, Layer, Matrix, Place, unplaced
from projects.pahq.graph import Graph
from shared.errors import UserError


def decoder_of(model: nn.Module) -> Decoder:
    """The parts of a causal language model of transformers, or of a `tiny.TinyDecoder`.

    The tensors are the model's own but for the projections of attention, which are sorted by head.

    Raises:
        UserError: there is no adapter for its family, or it is a variant that none handles.
    """
    from projects.pahq.tiny import TinyDecoder

    if isinstance(model, TinyDecoder):
        return model.decoder()
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if family not in FAMILIES:
        raise UserError(
            f"no adapter for models of the family {family}; there are: {', '.join(FAMILIES)}"
        )
    try:
        return FAMILIES[family](model, family)
    except AttributeError as error:
        raise UserError(
            f"this model of the family {family} has not the parts of its family ({error})"
        ) from None


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def _by_head(linear: Any, width: int) -> tuple[Tensor, Tensor | None]:
    """A projection [n E, D] as [n, E, D], and its bias [n, E]."""
    bias = linear.bias
    return linear.weight.unflatten(0, (-1, width)), None if bias is None else bias.view(-1, width)


def _stack(*projections: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Q, K and V, each by head, one after the other."""
    biases = [bias for _, bias in projections if bias is not None]
    weight = torch.cat([weight for weight, _ in projections]).contiguous()
    return weight, torch.cat(biases) if biases else None


def _out(weight: Tensor, width: int) -> Tensor:
    """The output projection [D, H E] as [H, E, D]."""
    return weight.T.unflatten(0, (-1, width)).contiguous()


def _mlp(layer: int, act: Callable[[Tensor], Tensor], x: Tensor, apply: Apply) -> Tensor:
    return apply(f"{layer}.down", act(apply(f"{layer}.up", x)))


def _gated(layer: int, act: Callable[[Tensor], Tensor], x: Tensor, apply: Apply) -> Tensor:
    return apply(f"{layer}.down", act(apply(f"{layer}.gate", x)) * apply(f"{layer}.up", x))


def _unembed(x: Tensor, apply: Apply) -> Tensor:
    return apply("unembed", x)


def _matrix(linear: Any) -> Matrix:
    return Matrix(linear.weight, linear.bias)


# ---- positions -----------------------------------------------------------------------------------


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


class _Angles:
    """cos and sin [T, angles] of a rotary module, which all layers share, for the last length."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, q: Tensor) -> tuple[Tensor, Tensor]:
        length = q.shape[-2]
        last = self._last
        if last is None or len(last[0]) != length or last[0].device != q.device:
            cos, sin = self.module(q, torch.arange(length, device=q.device)[None])
            last = self._last = (cos[0].detach(), sin[0].detach())
        return last


def _rotary(
    angles: _Angles, q_norm: Any, k_norm: Any, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Norms of heads (Qwen3) and rotary positions, of part of a head where the angles are fewer."""
    cos, sin = angles.of(q)
    if q_norm is not None:
        q, k = q_norm(q), k_norm(k)

    def turn(x: Tensor) -> Tensor:
        turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        turned = turned * cos + _rotate_half(turned) * sin
        return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned

    return turn(q), turn(k)


# ---- families ------------------------------------------------------------------------------------


def _llama(model: Any, family: str) -> Decoder:
    """Llama, Mistral, Qwen2 (biases) and Qwen3 (norms of heads)."""
    inner, config = model.model, model.config
    angles = _Angles(inner.rotary_emb)
    layers, matrices = [], {"unembed": _matrix(model.lm_head)}
    for number, block in enumerate(inner.layers):
        attention, width = block.self_attn, block.self_attn.head_dim
        qkv, bias = _stack(*(_by_head(getattr(attention, f"{name}_proj"), width) for name in "qkv"))
        place: Place = partial(
            _rotary,
            angles,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
        )
        for name in ("gate", "up", "down"):
            matrices[f"{number}.{name}"] = _matrix(getattr(block.mlp, f"{name}_proj"))
        layers.append(
            Layer(
                attention_norm=block.input_layernorm,
                qkv=qkv,
                qkv_bias=bias,
                place=place,
                scale=attention.scaling,
                out=_out(attention.o_proj.weight, width),
                out_bias=attention.o_proj.bias,
                mlp_norm=block.post_attention_layernorm,
                mlp=partial(_gated, number, block.mlp.act_fn),
            )
        )
    graph = Graph(len(layers), config.num_attention_heads, config.num_key_value_heads)
    return Decoder(
        family, graph, tuple(layers), inner.embed_tokens, inner.norm, matrices, _unembed,
        partial(_logits, model),
    )  # fmt: skip


def _gpt2(model: Any, family: str) -> Decoder:
    """GPT-2, whose linear layers keep [in, out]."""
    inner, config = model.transformer, model.config
    width = config.hidden_size // config.num_attention_heads
    layers, matrices = [], {"unembed": _matrix(model.lm_head)}
    for number, block in enumerate(inner.h):
        attention = block.attn
        matrices[f"{number}.up"] = Matrix(block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
        matrices[f"{number}.down"] = Matrix(block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)
        layers.append(
            Layer(
                attention_norm=block.ln_1,
                qkv=attention.c_attn.weight.T.unflatten(0, (-1, width)).contiguous(),
                qkv_bias=attention.c_attn.bias.view(-1, width),
                place=unplaced,
                scale=attention.scaling,
                out=attention.c_proj.weight.unflatten(0, (-1, width)),
                out_bias=attention.c_proj.bias,
                mlp_norm=block.ln_2,
                mlp=partial(_mlp, number, block.mlp.act),
            )
        )

    def embed(tokens: Tensor) -> Tensor:
        return inner.wte(tokens) + inner.wpe(torch.arange(tokens.shape[1], device=tokens.device))

    heads = config.num_attention_heads
    graph = Graph(len(layers), heads, heads)
    return Decoder(
        family, graph, tuple(layers), embed, inner.ln_f, matrices, _unembed, partial(_logits, model)
    )


def _gpt_neox(model: Any, family: str) -> Decoder:
    """GPT-NeoX and Pythia: Q, K and V of a head stand side by side; attention and MLP of a layer
    may read the same stream.
    """
    inner, config = model.gpt_neox, model.config
    angles = _Angles(inner.rotary_emb)
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    layers, matrices = [], {"unembed": _matrix(model.lm_head)}
    for number, block in enumerate(inner.layers):
        attention = block.attention
        weight, bias = _by_head(attention.query_key_value, width)  # head by head: q, k, v
        matrices[f"{number}.up"] = _matrix(block.mlp.dense_h_to_4h)
        matrices[f"{number}.down"] = _matrix(block.mlp.dense_4h_to_h)
        layers.append(
            Layer(
                attention_norm=block.input_layernorm,
                qkv=torch.cat([weight[letter::3] for letter in range(3)]).contiguous(),
                qkv_bias=None
                if bias is None
                else torch.cat([bias[letter::3] for letter in range(3)]),
                place=partial(_rotary, angles, None, None),
                scale=attention.scaling,
                out=_out(attention.dense.weight, width),
                out_bias=attention.dense.bias,
                mlp_norm=block.post_attention_layernorm,
                mlp=partial(_mlp, number, block.mlp.act),
            )
        )
    graph = Graph(len(layers), heads, heads, parallel=bool(config.use_parallel_residual))
    return Decoder(
        family, graph, tuple(layers), inner.embed_in, inner.final_layer_norm, matrices, _unembed,
        partial(_logits, model),
    )  # fmt: skip


def _opt(model: Any, family: str) -> Decoder:
    """OPT, but for its one size that normalises after each block (350m)."""
    inner, config = model.model.decoder, model.config
    if not config.do_layer_norm_before or inner.project_in is not None:
        raise UserError(
            "this OPT normalises after its blocks or projects its embedding (opt-350m), which the"
            " graph of edges does not describe; take another size"
        )
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    layers, matrices = [], {"unembed": _matrix(model.lm_head)}
    for number, block in enumerate(inner.layers):
        attention = block.self_attn
        qkv, bias = _stack(*(_by_head(getattr(attention, f"{name}_proj"), width) for name in "qkv"))
        matrices[f"{number}.up"] = _matrix(block.fc1)
        matrices[f"{number}.down"] = _matrix(block.fc2)
        layers.append(
            Layer(
                attention_norm=block.self_attn_layer_norm,
                qkv=qkv,
                qkv_bias=bias,
                place=unplaced,
                scale=attention.scaling,
                out=_out(attention.out_proj.weight, width),
                out_bias=attention.out_proj.bias,
                mlp_norm=block.final_layer_norm,
                mlp=partial(_mlp, number, block.activation_fn),
            )
        )

    def embed(tokens: Tensor) -> Tensor:
        return inner.embed_tokens(tokens) + inner.embed_positions(torch.ones_like(tokens))

    graph = Graph(len(layers), heads, heads)
    norm = inner.final_layer_norm or nn.Identity()
    return Decoder(
        family, graph, tuple(layers), embed, norm, matrices, _unembed, partial(_logits, model)
    )


FAMILIES: dict[str, Callable[[Any, str], Decoder]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
