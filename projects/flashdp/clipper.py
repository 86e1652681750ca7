"""FlashDP's clipper: it takes what each layer's backward brings of each sample, clips it, and adds
it to `.grad`.

It also knows what `.grad` holds: a sum of clipped gradients, or what has already been released. A
gradient that others have written to is found and refused.

Notation: B samples, T positions; sample i, norm n_il in clip group l with bound C_l; factor
c_il = min(1, C_l / n_il).
"""

import weakref
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from projects.flashdp import backends, layers
from projects.flashdp.factors import Factors, square_norms
from projects.flashdp.groups import Group, parameter_name
from shared.errors import UserError


class _Written(NamedTuple):
    """A gradient as it was when its last sample, or its noise, had been added."""

    gradient: "weakref.ref[Tensor]"
    version: int
    fingerprint: Tensor | None  # None once it is released: what then becomes of it does no harm


def _fingerprint(gradient: Tensor) -> Tensor:
    """Some of the elements."""
    stride = max(1, gradient.numel() // 64)
    return gradient.as_strided((gradient.numel() // stride,), (stride,)).clone()


class PerLayerClipper:
    """FlashDP's clipper: what a layer's backward brings is clipped and added to `.grad` at once,
    and nothing is kept.

    Args:
        groups: by name of parameter.
        mean: True when losses are averaged over the batch, so that a sample's gradient arrives
            divided by the batch's size.
    """

    def __init__(self, groups: Mapping[str, Group], backend: str, mean: bool):
        self.groups, self.backend, self.mean = groups, backend, mean
        self.chosen: dict[tuple[str, int, int], str] = {}  # by layer, batch size and positions
        self._written: dict[int, _Written] = {}  # by parameter

    def matrix(
        self,
        layer: layers.Private,
        left_BTl: Tensor,
        right_BTr: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        g_BTp: Tensor,
    ) -> None:
        samples, positions = left_BTl.shape[:2]
        name = layer.layer_name
        sums = None if bias is None else g_BTp.sum(1, dtype=bias.dtype)
        if weight is None:
            self.vectors(layer, {"bias": sums})
            return
        group = self.groups[parameter_name(name, "weight")]
        joint = bias is not None and self.groups[parameter_name(name, "bias")] is group
        factors = self._factors(group, samples, square_norms([sums]) if joint else None)
        out, fresh = self._gradient(weight)
        backend = self._backend(name, samples, positions, out, left_BTl)
        backends.BACKENDS[backend](left_BTl, right_BTr, out, fresh, factors)
        self.wrote(weight)
        c = factors.found()
        if joint:
            self._add(bias, sums, c)
        elif bias is not None:
            self.vectors(layer, {"bias": sums})

    def vectors(self, layer: layers.Private, gradients: Mapping[str, Tensor]) -> None:
        members: dict[Group, list[str]] = {}
        for key in gradients:
            members.setdefault(self.groups[parameter_name(layer.layer_name, key)], []).append(key)
        for group, keys in members.items():
            own = [gradients[key] for key in keys]
            c = self._factors(group, len(own[0])).of(square_norms(own))
            for key, gradient in zip(keys, own, strict=True):
                self._add(getattr(layer, key), gradient, c)

    def embedding(
        self, layer: layers.Private, ids_BT: Tensor, g_BTd: Tensor, weight: Tensor
    ) -> None:
        group = self.groups[parameter_name(layer.layer_name, "weight")]
        token, owner, rows, squares = embedding_rows(ids_BT, g_BTd, weight)
        factors = self._factors(group, len(ids_BT)).of(squares).to(rows.dtype)[owner]
        out, fresh = self._gradient(weight)
        if fresh:
            out.zero_()
        rows.mul_(factors[:, None])
        if out.is_cuda or not bool(factors.all()):  # 0 times what is not finite is not 0
            rows = torch.where((factors > 0)[:, None], rows, 0)
        out.index_add_(0, token, rows)
        self.wrote(weight)

    def _factors(self, group: Group, samples: int, extra: Tensor | None = None) -> Factors:
        return Factors(group.bound, samples if self.mean else 1, extra, group.norms)

    def _gradient(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """Where the sum goes, and whether it begins here."""
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            return parameter.grad, True
        if self.state(parameter) == "released":
            raise UserError(
                "a backward after optimizer.step() without optimizer.zero_grad() would add to a"
                " gradient already released"
            )
        return parameter.grad, False

    def wrote(self, parameter: Tensor, released: bool = False) -> None:
        """Remember the gradient as it is, so that a change by others shows."""
        gradient = parameter.grad
        fingerprint = None if released else _fingerprint(gradient)
        self._written[id(parameter)] = _Written(
            weakref.ref(gradient), gradient._version, fingerprint
        )

    def state(self, parameter: Tensor, look: bool = False) -> Literal["sum", "released"]:
        """What `.grad` holds: a sum of clipped gradients, or what already went to the optimizer.

        Raises UserError when something else has written to it (a second clipping); zeroing is fine.
        What torch does not count as a write (`.grad.data`, a gradient scaler) shows in some of the
        elements, for which `look` waits for the device.
        """
        known = self._written.get(id(parameter))
        same = (
            known is not None
            and known.gradient() is parameter.grad
            and known.version == parameter.grad._version
        )
        if same and known.fingerprint is None:
            return "released"
        if same and not (look and not torch.equal(known.fingerprint, _fingerprint(parameter.grad))):
            return "sum"
        if bool(parameter.grad.any()):
            raise UserError(
                "a gradient was changed between the backward and the step; what is not the sum of"
                " clipped gradients is not private (for mixed precision use torch.autocast with"
                " bfloat16, which needs no gradient scaler)"
            )
        return "sum"

    def _add(self, parameter: Tensor, gradients: Tensor, factors: Tensor) -> None:
        """Add the clipped sum of per-sample gradients [B, ...]."""
        out, fresh = self._gradient(parameter)
        flat, flat_out = gradients.flatten(1), out.view(-1)
        if flat.dtype != out.dtype:
            flat = flat.to(out.dtype)
        if out.is_cuda or not factors.all():  # 0 times what is not finite is not 0
            flat = torch.where((factors > 0)[:, None], flat, 0)
        torch.addmv(flat_out, flat.T, factors.to(out.dtype), beta=0 if fresh else 1, out=flat_out)
        self.wrote(parameter)

    def _backend(self, name: str, samples: int, positions: int, out: Tensor, left: Tensor) -> str:
        key = (name, samples, positions)
        if key not in self.chosen:
            if self.backend == "auto":
                self.chosen[key] = backends.choose(
                    samples, positions, *out.shape, out.device.type, left.element_size()
                )
            else:
                self.chosen[key] = backends.fitting(self.backend, out)
        return self.chosen[key]


def embedding_rows(
    ids_BT: Tensor, g_BTd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The per-sample gradients of an embedding without their empty rows.

    A token may stand in a sample more than once, and its rows are added before a norm is taken.

    Returns:
        token, owner [B*T]: which row of the weight and which sample each row belongs to; rows [B*T,
        d], unused ones at the end being 0; squares [B]: the squared norm of each sample's gradient.
    """
    samples, positions = ids_BT.shape
    sample = torch.arange(samples, device=ids_BT.device).repeat_interleave(positions)
    # equal (sample, token) pairs now adjoin
    key, order = torch.sort(sample * len(weight) + ids_BT.flatten(), stable=True)
    slot = torch.cat([key.new_zeros(1), (key[1:] != key[:-1]).cumsum(0)])
    place = torch.empty_like(slot).index_copy_(0, order, slot)
    rows = torch.zeros_like(g_BTd.flatten(0, 1), dtype=weight.dtype).index_add_(
        0, place, g_BTd.flatten(0, 1).to(weight.dtype)
    )
    token, owner = (
        torch.zeros_like(key).index_copy_(0, slot, part)
        for part in (key % len(weight), key // len(weight))
    )
    squares = rows.new_zeros(samples).index_add_(
        0, owner, torch.linalg.vector_norm(rows, dim=1).square()
    )
    return token, owner, rows, squares
