"""Which products run in which precision: the one place where PAHQ differs from plain ACDC.

A policy says which heads are high while an edge is tested; `Projections` carries it out. With `rtn`
none is: everything in scope is rounded to nearest, the baseline that PAHQ must be compared with.

Scopes: qkv (the paper's): the projections of attention; attn: also what heads write; linear: also
MLPs and the unembedding. Norms, scores, softmax and sums stay float32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from projects.pahq.decoder import Decoder
from projects.pahq.quantise import Format, LowMatrix, Rows, Scale, straight_through
from projects.pahq.scheduler import Masters, Resident

Kind = Literal["fp32", "rtn", "pahq-receiver", "pahq-sender", "pahq-both"]
Scope = Literal["qkv", "attn", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCOPES: tuple[Scope, ...] = get_args(Scope)
Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Policy:
    """What is low and what is high.

    Attributes:
        kind: fp32: nothing is low; rtn: no head is high; pahq-receiver, pahq-sender, pahq-both: the
            head that owns the receiver of the edge under test, that of its sender, or both.
        scale: of weights; none is the public release's unscaled cast.
    """

    kind: Kind = "fp32"
    format: Format = "int8"
    scope: Scope = "qkv"
    scale: Scale = "head"

    @property
    def follows_receiver(self) -> bool:
        return self.kind in ("pahq-receiver", "pahq-both")

    @property
    def follows_sender(self) -> bool:
        return self.kind in ("pahq-sender", "pahq-both")


class Projections:
    """The products of a decoder under a policy. `high` are the heads that are high now.

    Args:
        masters: what brings the full-precision slices of a high head; they stay where they are by
            default.
    """

    def __init__(self, decoder: Decoder, policy: Policy, masters: Masters | None = None) -> None:
        self.decoder, self.policy = decoder, policy
        self.masters: Masters = masters or Resident(decoder)
        self.high: frozenset[Head] = frozenset()
        self._qkv: list[LowMatrix] = []
        self._out: list[LowMatrix] = []
        self._matrices: dict[str, LowMatrix] = {}
        self._last: tuple[Tensor, Rows] | None = None
        if policy.kind == "fp32":
            return
        form, scale = policy.format, policy.scale
        for layer in decoder.layers:
            self._qkv.append(LowMatrix(layer.qkv.detach(), form, scale))
            if policy.scope != "qkv":
                self._out.append(LowMatrix(layer.out.detach().transpose(1, 2), form, scale))
        if policy.scope == "linear":
            # a matrix without heads has no scale "per head": one for each output channel
            by_row: Scale = "none" if scale == "none" else "channel"
            self._matrices = {
                name: LowMatrix(matrix.weight.detach(), form, by_row)
                for name, matrix in decoder.matrices.items()
            }

    def select(self, heads: Iterable[Head]) -> None:
        """Make these heads the high ones. Nothing is high where nothing is low."""
        self.high = frozenset(heads) if self.policy.kind != "fp32" else frozenset()

    # ---- attention -------------------------------------------------------------------------------

    def qkv(self, layer: int, receivers: Sequence[int], x: Tensor, which: Sequence[int]) -> Tensor:
        """Projections of receivers of a layer's attention, [n, M, E].

        Args:
            receivers: their numbers within the layer, [n].
            x: the distinct normed inputs, [U, M, D].
            which: the input of each receiver, [n].
        """
        part = self.decoder.layers[layer]
        high = self._high_receivers(layer) if self._qkv else frozenset(receivers)
        groups: dict[tuple[int, bool], list[int]] = {}
        for place, receiver in enumerate(receivers):
            groups.setdefault((which[place], receiver in high), []).append(place)
        rows = self._qkv[layer].rows(x) if any(not is_high for _, is_high in groups) else None
        inputs = x.unbind()  # whose gradient is one stack
        result: Tensor | None = None
        for (number, is_high), places in groups.items():
            chosen = [receivers[place] for place in places]
            if is_high:
                weight = self.masters.qkv(layer, chosen)
                product = inputs[number] @ weight.flatten(0, 1).T
            else:
                product = self._low_qkv(layer, chosen, inputs[number], rows, number)
            made = product.unflatten(-1, (len(places), -1)).transpose(0, 1)  # [n, M, E]
            if len(groups) == 1:
                result = made
            else:
                result = (
                    made.new_empty(len(receivers), *made.shape[1:]) if result is None else result
                )
                result[places] = made
        assert result is not None
        return result if part.qkv_bias is None else result + part.qkv_bias[list(receivers), None]

    def _low_qkv(
        self, layer: int, chosen: list[int], x: Tensor, rows: Rows | None, number: int
    ) -> Tensor:
        assert rows is not None
        low = self._qkv[layer]
        whole = len(chosen) == low.codes.shape[0]
        product = low.product(
            Rows(rows.codes[number], rows.scale[number]), None if whole else chosen
        )
        weight = self.decoder.layers[layer].qkv
        return straight_through(product, x, (weight if whole else weight[chosen]).flatten(0, 1))

    def _high_receivers(self, layer: int) -> frozenset[int]:
        """Within a layer: Q of its high heads, and the K and V that these read."""
        graph = self.decoder.graph
        first = graph.first_reader(layer)
        heads = [head for at, head in self.high if at == layer]
        return frozenset(
            receiver - first
            for head in heads
            for receiver in graph.inputs_of(graph.head(layer, head))
        )

    def out(self, layer: int, heads: Sequence[int], mixed: Tensor) -> Sequence[Tensor]:
        """What each head writes into the stream, [M, D], for their mixed values [n, M, E]."""
        weight = self.decoder.layers[layer].out
        if not self._out:
            every = len(heads) == weight.shape[0]
            return (mixed @ (weight if every else weight[list(heads)])).unbind()
        low = self._out[layer]
        rows = low.rows(mixed)
        written = []
        for place, head in enumerate(heads):
            if (layer, head) in self.high:
                written.append(mixed[place] @ self.masters.out(layer, head))
            else:
                product = low.product(Rows(rows.codes[place], rows.scale[place]), head)
                written.append(straight_through(product, mixed[place], weight[head].T))
        return written

    # ---- everything else -------------------------------------------------------------------------

    def apply(self, name: str, x: Tensor) -> Tensor:
        """The product with a matrix of `Decoder.matrices`, [..., out]."""
        matrix = self.decoder.matrices[name]
        if name not in self._matrices:
            return F.linear(x, matrix.weight, matrix.bias)
        low = self._matrices[name]
        if self._last is None or self._last[0] is not x:  # gate and up read the same
            self._last = (x, low.rows(x.flatten(0, -2)))
        product = straight_through(low.product(self._last[1]), x.flatten(0, -2), matrix.weight)
        product = product.view(*x.shape[:-1], -1)
        return product if matrix.bias is None else product + matrix.bias

    # ---- bytes -----------------------------------------------------------------------------------

    def weight_bytes(self) -> dict[str, int]:
        """What the weights of the layers and the unembedding take while a circuit is sought: low
        copies, the full matrices that are not in scope (fp32), and the full ones of all heads that
        a high head is taken from (masters).
        """
        low = [*self._qkv, *self._out, *self._matrices.values()]
        full = 0
        for layer in self.decoder.layers:
            full += 0 if self._qkv else layer.qkv.numel()
            full += 0 if self._out else layer.out.numel()
        full += sum(
            matrix.weight.numel()
            for name, matrix in self.decoder.matrices.items()
            if name not in self._matrices
        )
        masters = sum(
            (layer.qkv.numel() if self._qkv else 0) + (layer.out.numel() if self._out else 0)
            for layer in self.decoder.layers
        )
        return {"low": sum(one.nbytes for one in low), "fp32": 4 * full, "masters": 4 * masters}
