"""Layers whose backward hands each sample's share of the gradient to a clipper, and nothing to
autograd.

A layer keeps its parameters, its place in the model and its keys in the state_dict: only its class
changes, to a subclass whose forward runs through an autograd function. (A subclass of a torch layer
that calls `super().forward` keeps doing what it adds.) The gradient of the layer's input is the
ordinary one, so nothing upstream knows.

Shapes: B samples, T positions (all dimensions between a tensor's first and last), d inputs, p
outputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shared.errors import UserError


class Clipper(Protocol):
    """Takes what a layer's backward knows of each sample. Every call is one backward of one layer
    on one micro-batch.
    """

    def matrix(
        self,
        layer: "Private",
        left_BTl: Tensor,
        right_BTr: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        g_BTp: Tensor,
    ) -> None:
        """Sample i's weight gradient is leftᵢᵀ rightᵢ, that of its bias the sum of g over the
        positions.
        """

    def embedding(self, layer: "Private", ids_BT: Tensor, g_BTd: Tensor, weight: Tensor) -> None:
        """Sample i's gradient of row v is the sum of g over the positions where its id is v."""

    def vectors(self, layer: "Private", gradients: Mapping[str, Tensor]) -> None:
        """Per-sample gradients [B, ...] as they are, for small parameters, by the parameter's name
        in the layer.
        """


class Flow:
    """What the layers of one model know of the forward under way."""

    def __init__(self, clipper: Clipper):
        self.clipper = clipper
        self.samples: int | None = None  # of the batch that the model was called with
        self.dimensions = 0  # of its tensor
        self.inside = False  # the model's own forward
        self.forward = 0  # its number
        self._forwards = 0  # how many there have been
        self.called: set[str] = set()  # layers called in it
        # layers whose backward has run, and for which forward
        self.spent: set[tuple[str, int]] = set()
        # whether more than one backward for a layer and forward is an error (not in the flat
        # baselines)
        self.checked = True

    def enter(self, batch: Tensor) -> None:
        """The model's forward begins."""
        self.samples, self.dimensions = len(batch), batch.ndim
        self._forwards += 1
        self.inside, self.forward, self.called = True, self._forwards, set()

    def leave(self, outputs: Iterable[Tensor]) -> None:
        """It has ended. Recomputations during the backward are still to come; another forward may
        lie between.
        """
        self.inside = False
        mine = (self.forward, self.samples, self.dimensions)

        def resume(gradient: Tensor) -> None:
            self.forward, self.samples, self.dimensions = mine

        for output in outputs:
            if output.requires_grad:
                output.register_hook(resume)


class Private:
    """What `privatise` adds to a layer; `layer_name` is its place in the model."""

    flow: Flow
    layer_name: str
    # the input has lost its batch dimension: [B*T, d], the samples one after another
    flattened: bool
    # a constant that requires a gradient, so that the backward runs though no parameter is in the
    # graph
    anchor: Tensor


class PrivateLinear(Private, nn.Linear):
    """Input [B, d], [B, T, d] or [B, ..., d]."""

    def forward(self, x: Tensor) -> Tensor:
        if not _records(self):
            return F.linear(x, self.weight, self.bias)
        x = _autocast(x)
        return _Matrix.apply(self.anchor, x, self, False, _samples(self, x))


class PrivateConv1D(Private, nn.Module):
    """transformers' `Conv1D`, a linear layer whose weight is [d, p]."""

    def forward(self, x: Tensor) -> Tensor:
        if not _records(self):
            return super().forward(x)  # type: ignore[misc]
        x = _autocast(x)
        return _Matrix.apply(self.anchor, x, self, True, _samples(self, x))


class PrivateEmbedding(Private, nn.Embedding):
    """Ids [B, ...]. Ids of a leading dimension 1 in a larger batch (GPT-2's positions) are repeated
    for each sample.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _records(self):
            return F.embedding(input, self.weight, self.padding_idx)
        if len(input) == 1 and input.ndim > 1 and self.flow.samples is not None:
            input = input.expand(self.flow.samples, *input.shape[1:])
        return _Embedding.apply(self.anchor, input, self, _samples(self, input))


class PrivateLayerNorm(Private, nn.LayerNorm):
    """Input [B, ..., *normalized_shape]."""

    def forward(self, input: Tensor) -> Tensor:
        if not _records(self):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if input.is_cuda and torch.is_autocast_enabled("cuda"):
            input = input.float()
        return _LayerNorm.apply(self.anchor, input, self, _samples(self, input))


class PrivateRMSNorm(Private, nn.RMSNorm):
    """Input [B, ..., *normalized_shape]."""

    def forward(self, x: Tensor) -> Tensor:
        if not _records(self):
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        normal = F.rms_norm(x, self.normalized_shape, None, self.eps)
        return _Scale.apply(self.anchor, normal, self, 0.0, _samples(self, x))


class PrivateTransformersRMSNorm(Private, nn.Module):
    """The RMSNorm of Llama and its kin in transformers, as its own class computes it: normalised in
    float32, cast back, scaled.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _records(self):
            return super().forward(hidden_states)  # type: ignore[misc]
        wide = hidden_states.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _epsilon(self))
        return _Scale.apply(
            self.anchor, normal.to(hidden_states.dtype), self, 0.0, _samples(self, hidden_states)
        )


class PrivateGemmaRMSNorm(Private, nn.Module):
    """Gemma's RMSNorm: the scale is 1 + weight, applied in float32 before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        if not _records(self):
            return super().forward(x)  # type: ignore[misc]
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _epsilon(self))
        return _Scale.apply(self.anchor, normal, self, 1.0, _samples(self, x)).type_as(x)


def _epsilon(layer: Any) -> float:
    return layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps


# ---- which class for which layer -----------------------------------------------------------------


def private_class(layer: nn.Module) -> type[nn.Module] | None:
    """The subclass of the layer's class that makes it private, or None when there is no rule for
    it.

    Raises UserError for an option of a known layer that per-sample gradients do not allow.
    """
    kind = type(layer)
    if isinstance(layer, nn.Embedding):
        if layer.sparse or layer.max_norm is not None or layer.scale_grad_by_freq:
            raise UserError(
                "an Embedding with sparse, max_norm or scale_grad_by_freq has no per-sample"
                " gradient; make it a plain one"
            )
        return _between(kind, nn.Embedding, PrivateEmbedding)
    for base, private in (
        (nn.Linear, PrivateLinear),
        (nn.LayerNorm, PrivateLayerNorm),
        (nn.RMSNorm, PrivateRMSNorm),
    ):
        if isinstance(layer, base):
            return _between(kind, base, private)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return type(f"Private{kind.__name__}", (PrivateConv1D, kind), {})
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) and [
        name for name, _ in layer.named_parameters()
    ] == ["weight"]:
        for private in (PrivateTransformersRMSNorm, PrivateGemmaRMSNorm):
            if _agrees(layer, private):
                return type(f"Private{kind.__name__}", (private, kind), {})
    return None


def _between(kind: type, base: type, private: type) -> type:
    """`private` put between `base` and its subclass `kind` in the order in which methods are looked
    up.
    """
    return private if kind is base else type(f"Private{kind.__name__}", (kind, private), {})


@torch.no_grad()
def _agrees(layer: nn.Module, private: type) -> bool:
    """Whether `private`'s formula computes what the layer does, tried on random numbers: norms of
    this name differ.
    """
    weight = layer.weight
    device = "cpu" if weight.is_meta else weight.device
    probe = (
        torch.linspace(-2, 3, 4 * weight.numel(), device=device, dtype=torch.float32)
        .sin()
        .view(2, 2, -1)
        .to(weight.dtype)
    )
    if not hasattr(layer, "variance_epsilon") and not hasattr(layer, "eps"):
        return False
    wide = probe.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _epsilon(layer))
    formula = (
        (weight * normal.to(probe.dtype))
        if private is PrivateTransformersRMSNorm
        else ((1 + weight.to(wide.dtype)) * normal)
    )
    try:
        return torch.allclose(
            layer(probe).to(wide.dtype),
            formula.to(wide.dtype),
            rtol=1e-2 if weight.itemsize == 2 else 1e-5,
        )
    except (RuntimeError, TypeError):
        return False


def privatise(
    layer: nn.Module, private: type[nn.Module], name: str, flow: Flow, flattened: bool
) -> None:
    """Change the layer's class; `restore` undoes it."""
    parameter = next(layer.parameters())
    layer.__dict__.update(
        flow=flow,
        layer_name=name,
        flattened=flattened,
        anchor=torch.zeros((), device=parameter.device, requires_grad=True),
        public_class=type(layer),
    )
    layer.__class__ = private


def restore(layer: nn.Module) -> None:
    """Give the layer its own class back."""
    layer.__class__ = layer.__dict__["public_class"]
    for name in ("flow", "layer_name", "flattened", "anchor", "public_class"):
        del layer.__dict__[name]


# ---- forwards ------------------------------------------------------------------------------------


def _records(layer: Any) -> bool:
    """Whether this call leads to a backward. UserError where its sample would be counted twice, or
    nobody counts.
    """
    if not torch.is_grad_enabled():
        return False
    flow: Flow = layer.flow
    if not flow.checked:
        return True
    if flow.inside:
        if layer.layer_name in flow.called:
            raise UserError(_twice(layer))
        flow.called.add(layer.layer_name)
    elif torch._C._current_graph_task_id() < 0:  # not a checkpoint's recomputation either
        raise UserError(
            f"{layer.layer_name or 'the layer'} is called outside the model's forward; call the"
            " model that was made private"
        )
    return True


def _twice(layer: Any) -> str:
    name = layer.layer_name or "the layer"
    return (
        f"{name}: a second backward through one forward, or {name} is called twice in it: a"
        " sample's gradients would add up beyond the bound; make a new forward for each backward,"
        " give each call a layer of its own, or freeze it"
    )


def _autocast(x: Tensor) -> Tensor:
    """The input as autocast gives it to a matrix product, so that what is kept for the backward is
    as narrow as without privacy.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _samples(layer: Any, x: Tensor) -> int:
    """How many samples the first dimension of `x` holds. UserError when it cannot be the batch."""
    known = layer.flow.samples
    if layer.flattened:
        if known is None or len(x) % known:
            raise UserError(
                f"{layer.layer_name}: {len(x)} rows cannot be split among {known} samples"
            )
        return known
    if x.ndim < 2 and not isinstance(layer, nn.Embedding):
        raise UserError(
            f"{layer.layer_name}: an input of shape {list(x.shape)} has no batch dimension"
        )
    if x.ndim == 1 and layer.flow.dimensions > 1:
        raise UserError(
            f"{layer.layer_name}: ids of shape [{len(x)}] may be positions or samples; give them a"
            " batch dimension: [1, T] or [B, 1]"
        )
    if known is not None and len(x) != known:
        raise UserError(
            f"{layer.layer_name}: its input has {len(x)} rows in a batch of {known} samples, which"
            " cannot be told apart; keep the batch dimension first, or name the layer in"
            " flattened=[...] if its rows are the samples' positions one after another"
        )
    return len(x)


# ---- autograd functions --------------------------------------------------------------------------


def _once(ctx: Any) -> None:
    """A layer's backward may run once for each forward of the model."""
    flow, key = ctx.layer.flow, (ctx.layer.layer_name, ctx.number)
    if flow.checked and key in flow.spent:
        raise UserError(_twice(ctx.layer))
    flow.spent.add(key)


class _Matrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, x, layer, transposed, samples):  # type: ignore[no-untyped-def]
        ctx.layer, ctx.number, ctx.weight, ctx.bias, ctx.transposed, ctx.samples = (
            layer,
            layer.flow.forward,
            layer.weight,
            layer.bias,
            transposed,
            samples,
        )
        ctx.save_for_backward(x, layer.weight)
        return F.linear(x, layer.weight.T if transposed else layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _once(ctx)
        x, weight = ctx.saved_tensors
        if ctx.samples:
            x_BTd, g_BTp = (t.reshape(ctx.samples, -1, t.shape[-1]) for t in (x, g))
            left, right = (x_BTd, g_BTp) if ctx.transposed else (g_BTp, x_BTd)
            ctx.layer.flow.clipper.matrix(
                ctx.layer, left, right, _trainable(ctx.weight), _trainable(ctx.bias), g_BTp
            )
        grad = None
        if ctx.needs_input_grad[1]:
            wide = weight.to(g.dtype)
            grad = g @ (wide.T if ctx.transposed else wide)
        return None, grad, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, ids, layer, samples):  # type: ignore[no-untyped-def]
        ctx.layer, ctx.number, ctx.weight, ctx.samples = (
            layer,
            layer.flow.forward,
            layer.weight,
            samples,
        )
        ctx.save_for_backward(ids)
        return F.embedding(ids, layer.weight, layer.padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _once(ctx)
        if not ctx.samples:
            return None, None, None, None
        ids = ctx.saved_tensors[0].reshape(ctx.samples, -1)
        g_BTd = g.reshape(*ids.shape, -1)
        padding = ctx.layer.padding_idx
        if padding is not None:
            g_BTd = g_BTd.masked_fill((ids == padding)[..., None], 0)
        ctx.layer.flow.clipper.embedding(ctx.layer, ids, g_BTd, ctx.weight)
        return None, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, x, layer, samples):  # type: ignore[no-untyped-def]
        y, mean, rstd = torch.native_layer_norm(
            x, layer.normalized_shape, layer.weight, layer.bias, layer.eps
        )
        ctx.layer, ctx.number, ctx.weight, ctx.bias, ctx.samples = (
            layer,
            layer.flow.forward,
            layer.weight,
            layer.bias,
            samples,
        )
        ctx.save_for_backward(x, mean, rstd, layer.weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _once(ctx)
        x, mean, rstd, weight = ctx.saved_tensors
        wanted = [
            ctx.needs_input_grad[1],
            _trainable(ctx.weight) is not None,
            _trainable(ctx.bias) is not None,
        ]
        if not ctx.samples:
            return None, g, None, None
        grad, *both = _layer_norm_backward(
            g, x, ctx.layer.normalized_shape, mean, rstd, weight, ctx.bias, wanted, ctx.samples
        )
        ctx.layer.flow.clipper.vectors(
            ctx.layer,
            {
                key: own
                for key, own in zip(("weight", "bias"), both, strict=True)
                if own is not None
            },
        )
        return None, grad, None, None


def _layer_norm_backward(g, x, shape, mean, rstd, weight, bias, wanted, samples):  # type: ignore[no-untyped-def]
    """The gradient of the input, and the per-sample gradients [B, ...] of weight and bias; None
    where not `wanted`.
    """
    backward = torch.ops.aten.native_layer_norm_backward
    g = g.contiguous()
    if not g.is_cuda:  # torch's own kernel, sample by sample: one pass for all three
        parts = zip(*(part.split(len(x) // samples) for part in (g, x, mean, rstd)), strict=True)
        found = zip(
            *(
                backward(g_i, x_i, shape, m_i, r_i, weight, bias, wanted)
                for g_i, x_i, m_i, r_i in parts
            ),
            strict=True,
        )
        return [
            join(each) if want else None
            for want, join, each in zip(
                wanted, (_cat, torch.stack, torch.stack), found, strict=True
            )
        ]
    grad = (
        backward(g, x, shape, mean, rstd, weight, bias, [True, False, False])[0]
        if wanted[0]
        else None
    )
    of_weight = (
        _sum_positions(torch.addcmul(-mean * rstd, x, rstd).mul_(g), samples, shape)
        if wanted[1]
        else None
    )
    return grad, of_weight, _sum_positions(g, samples, shape) if wanted[2] else None


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Scale(torch.autograd.Function):
    """(weight + offset) * normal, the last step of an RMSNorm."""

    @staticmethod
    def forward(ctx, anchor, normal, layer, offset, samples):  # type: ignore[no-untyped-def]
        ctx.layer, ctx.number, ctx.weight, ctx.offset, ctx.samples = (
            layer,
            layer.flow.forward,
            layer.weight,
            offset,
            samples,
        )
        ctx.save_for_backward(normal, layer.weight)
        return (layer.weight + offset) * normal if offset else layer.weight * normal

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        _once(ctx)
        normal, weight = ctx.saved_tensors
        if ctx.samples:
            ctx.layer.flow.clipper.vectors(
                ctx.layer, {"weight": _sum_positions(g * normal, ctx.samples, weight.shape)}
            )
        grad = None
        if ctx.needs_input_grad[1]:
            grad = (g * ((weight + ctx.offset) if ctx.offset else weight)).to(normal.dtype)
        return None, grad, None, None, None


def _trainable(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is not None and parameter.requires_grad else None


def _sum_positions(values: Tensor, samples: int, shape: Sequence[int]) -> Tensor:
    """[B, ..., *shape] summed to [B, *shape]."""
    return values.reshape(samples, -1, *shape).sum(1)
