"""The patched forward: every receiver has its own input, made of the senders' outputs in the current
run where an edge is present, and of their outputs in the corrupted run where it is not:

    in(r) = sum_s c_s + sum_{s: edge s -> r} (o_s - c_s)          (s before r; ACDC, section 3)

The engine keeps o_s - c_s and c_s of every sender, for the current mask and the current high heads.
A change (edges removed, another head made high) recomputes only what it reaches: the heads and MLPs
downstream of it that still have a path to the output. Nothing in front of it is computed again.

Legend of shapes: S senders, R receivers, V variants evaluated at once, B prompts, T tokens, P scored
positions of a prompt, D the residual stream, E a head, N = V B.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from projects.pahq.decoder import Decoder
from projects.pahq.graph import Mask
from projects.pahq.policy import Head, Policy, Projections
from projects.pahq.scheduler import Masters
from shared.errors import UserError

Ablation = Literal["corrupted", "zero"]
# logits [V, B, P, vocabulary] -> what is minimised, [V]
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """What a change would do: the metric [V], and the senders that it reached with their new
    o_s - c_s, [n, V, B, T, D].
    """

    metric: Tensor
    senders: list[int]
    deltas: Tensor


class Engine:
    """The state of a search: a mask, the high heads, and every sender's output under them.

    Args:
        clean, corrupted: tokens [B, T].
        positions: the scored positions of each prompt, [B, P].
        ablation: what stands for a missing edge: the sender's output in the corrupted run, which is
            computed once with no head high, or zero. Biases of the output projections of attention
            belong to no sender and stay.

    Attributes:
        mask: bool [R, S]; change it through `set_mask` and `remove`.
        evaluations: trials so far, each variant counted.
        computed: heads and MLPs computed so far, each variant counted.
    """

    def __init__(
        self,
        decoder: Decoder,
        clean: Tensor,
        corrupted: Tensor,
        positions: Tensor,
        policy: Policy | None = None,
        ablation: Ablation = "corrupted",
        masters: Masters | None = None,
    ) -> None:
        self.decoder, self.graph = decoder, decoder.graph
        self.projections = Projections(decoder, policy or Policy(), masters)
        self.positions = positions
        self.evaluations = self.computed = 0
        graph, device = self.graph, decoder.device
        shape = (graph.senders, *clean.shape, decoder.width)
        with torch.no_grad():
            self.clean_embedding = decoder.embed(clean)
            self.corrupted = torch.zeros(shape, device=device)
            self._make_bases()
            self.mask = graph.full()
            # o_s - c_s while c is zero: the corrupted run itself
            self.deltas = torch.zeros(shape, device=device)
            # what a sender without edges into it writes, less c: nothing, where c is a run
            self._rest: Tensor | None = None
            self._knows_rest = False
            if ablation == "corrupted":
                self.deltas[0] = decoder.embed(corrupted)
                self._recompute_all()
                self._knows_rest = True
                self.corrupted = self.deltas
                self.deltas = torch.zeros(shape, device=device)
                self._make_bases()
            else:
                self._rest = self._at_rest()
                self._knows_rest = True
            self.deltas[0] = self.clean_embedding - self.corrupted[0]
            self._recompute_all()

    # ---- the state -------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self.projections.policy

    @property
    def cached_bytes(self) -> int:
        """Of cached activations: c, o - c, and the sums of c in front of each receiver."""
        kept = [self.corrupted, self.deltas, *self._bases]
        return sum(one.numel() * one.element_size() for one in kept)

    def set_mask(self, mask: Mask) -> None:
        """Take this mask, bool [R, S], and recompute."""
        self.mask = mask & self.graph.full()
        self._recompute_all()

    def select(self, heads: Iterable[Head]) -> None:
        """Make these heads the high ones, and recompute what that changes."""
        before = self.projections.high
        self.projections.select(heads)
        changed = before ^ self.projections.high
        if not changed:
            return
        graph = self.graph
        # heads that share a key-value head with a high one have their K and V high as well
        group = graph.group
        nodes = {
            graph.head(layer, other)
            for layer, head in changed
            for other in range(head // group * group, (head // group + 1) * group)
        }
        self._commit(self._run(tuple(sorted(nodes)), {}, 1))

    def remove(self, receiver: int, senders: Sequence[int], trial: Trial, variant: int = 0) -> None:
        """Remove edges for good, with a variant of the trial that removed them."""
        self.mask[receiver, list(senders)] = False
        self._commit((trial.senders, trial.deltas), variant)

    # ---- evaluation ------------------------------------------------------------------------------

    def logits(self) -> Tensor:
        """Of the current state, at the scored positions, [B, P, vocabulary]."""
        return self._logits(self._input(self.graph.out, 1, {}), 1)[0]

    def trial(self, receiver: int, senders: Sequence[Sequence[int]], metric: Metric) -> Trial:
        """Remove edges of one receiver, several sets of them at once, and keep nothing.

        Args:
            senders: for each of V variants the senders whose edges go.
        """
        variants = len(senders)
        rows = np.repeat(self.mask[receiver][None], variants, axis=0)
        for row, removed in zip(rows, senders, strict=True):
            row[list(removed)] = False
        self.evaluations += variants
        own = {receiver: self._inputs_of_rows(receiver, rows)}
        if receiver == self.graph.out:
            return Trial(metric(self._logits(own[receiver], variants)), [], self.deltas[:0, None])
        nodes, deltas = self._run(self.graph.owners(receiver), own, variants)
        overlay = dict(zip(nodes, deltas, strict=True))
        out = self._input(self.graph.out, variants, overlay)
        return Trial(metric(self._logits(out, variants)), nodes, deltas)

    def _logits(self, x: Tensor, variants: int) -> Tensor:
        """[V, B, P, vocabulary] of the output's input [N, T, D]."""
        batch, scored = self.positions.shape
        index = self.positions.repeat(variants, 1)[..., None].expand(-1, -1, x.shape[-1])
        normed = self.decoder.final_norm(x.gather(1, index))
        logits = self.decoder.unembed(normed, self.projections.apply)
        return logits.view(variants, batch, scored, -1)

    # ---- inputs of receivers ---------------------------------------------------------------------

    def _make_bases(self) -> None:
        """The corrupted stream in front of each layer's attention and MLP, and at the output."""
        graph = self.graph
        stream = self.corrupted[0].clone()
        self._bases: list[Tensor] = []
        for layer, part in enumerate(self.decoder.layers):
            self._bases.append(stream)
            heads = self.corrupted[graph.head(layer, 0) : graph.head(layer, 0) + graph.heads].sum(0)
            stream = stream + heads
            if part.out_bias is not None:
                stream = stream + part.out_bias
            self._bases.append(stream)
            if graph.mlp:
                stream = stream + self.corrupted[graph.mlp_sender(layer)]
        self._bases.append(stream)

    def base(self, receiver: int) -> Tensor:
        """The stream that a receiver sees with no edge present, [B, T, D]."""
        graph = self.graph
        layer = graph.layer_of_receiver(receiver)
        late = graph.mlp and not graph.parallel and receiver == graph.mlp_receiver(layer)
        return self._bases[2 * layer + late]

    def _input(self, receiver: int, variants: int, overlay: dict[int, Tensor]) -> Tensor:
        """[N, T, D] under the mask, with the outputs of `overlay` instead of the kept ones."""
        return self._inputs([receiver], variants, overlay)[0][0]

    def _inputs_of_rows(self, receiver: int, rows: np.ndarray) -> Tensor:
        """[N, T, D] of one receiver with a row of the mask for each variant, [V, S]."""
        return (self.base(receiver) + self._combine(rows)).flatten(0, 1)

    def _combine(self, rows: np.ndarray) -> Tensor:
        """The sums of o - c that rows [U, S] of the mask ask for, [U, B, T, D]."""
        columns = np.flatnonzero(rows.any(axis=0))
        if not len(columns):
            return torch.zeros_like(self.deltas[:1]).expand(len(rows), -1, -1, -1)
        weights = torch.from_numpy(rows[:, columns]).to(self.deltas)
        if len(columns) == columns[-1] + 1:  # all the first ones: no copy
            chosen = self.deltas[: len(columns)]
        else:
            chosen = self.deltas[torch.from_numpy(columns).to(self.deltas.device)]
        return (weights @ chosen.flatten(1)).unflatten(1, chosen.shape[1:])

    def _inputs(
        self, receivers: Sequence[int], variants: int, overlay: dict[int, Tensor]
    ) -> tuple[Tensor, list[int]]:
        """The distinct inputs [U, N, T, D] of receivers that stand at the same place of the stream,
        and which of them each receiver has. Receivers with the same edges share one.
        """
        rows, which = np.unique(self.mask[list(receivers)], axis=0, return_inverse=True)
        new = [node for node in overlay if rows[:, node].any()]
        kept = rows.copy()
        kept[:, new] = False
        # [U, B, T, D] -> [U, V, B, T, D]
        x = (self.base(receivers[0]) + self._combine(kept))[:, None]
        if new:
            weights = torch.from_numpy(rows[:, new]).to(self.deltas)
            chosen = torch.stack([overlay[node] for node in new])  # [n, V, B, T, D]
            x = x + (weights @ chosen.flatten(1)).unflatten(1, chosen.shape[1:])
        elif variants > 1:
            x = x.expand(-1, variants, -1, -1, -1)
        return x.flatten(1, 2), which.reshape(-1).tolist()

    # ---- recomputing -----------------------------------------------------------------------------

    def _commit(self, run: tuple[list[int], Tensor], variant: int = 0) -> None:
        senders, deltas = run
        if senders:
            self.deltas[senders] = deltas[:, variant]

    def _recompute_all(self) -> None:
        """Every head and MLP, layer by layer, into the kept outputs."""
        graph = self.graph
        for layer in range(graph.layers):
            self._layer(layer, np.ones(graph.senders, dtype=bool), {}, 1, None)

    def _at_rest(self) -> Tensor:
        """What each sender writes with no edge into it, [S, B, T, D], less c."""
        mask, deltas = self.mask, self.deltas
        self.mask = np.zeros_like(mask)
        self.deltas = torch.zeros_like(deltas)
        self._recompute_all()
        rest, self.mask, self.deltas = self.deltas, mask, deltas
        return rest

    def _run(
        self, seeds: Sequence[int], own: dict[int, Tensor], variants: int
    ) -> tuple[list[int], Tensor]:
        """Recompute `seeds` and what they reach, and keep nothing.

        Args:
            own: inputs of receivers [N, T, D] that do not follow from the mask.

        Returns:
            The senders, and their o - c, [n, V, B, T, D].
        """
        graph = self.graph
        todo = graph.descendants(self.mask, tuple(seeds)) & graph.live(self.mask)
        overlay: dict[int, Tensor] = {}
        if todo.any():
            first = graph.layer_of_sender(int(np.flatnonzero(todo)[0]))
            for layer in range(first, graph.layers):
                self._layer(layer, todo, own, variants, overlay)
        if not overlay:
            return [], self.deltas[:0, None]
        return list(overlay), torch.stack(list(overlay.values()))

    def _layer(
        self,
        layer: int,
        todo: np.ndarray,
        own: dict[int, Tensor],
        variants: int,
        overlay: dict[int, Tensor] | None,
    ) -> None:
        """Recompute the senders `todo` of a layer into `overlay`; None: into the kept outputs."""
        graph = self.graph
        first = graph.head(layer, 0)
        heads = [h for h in range(graph.heads) if todo[first + h]]
        found = overlay if overlay is not None else {}

        def put(sender: int, written: Tensor) -> None:
            """`written` [N, T, D]."""
            delta = written.unflatten(0, (variants, -1)) - self.corrupted[sender]
            if overlay is None:
                self.deltas[sender] = delta[0]
            else:
                overlay[sender] = delta

        busy = []
        for head in heads:
            if self._rests(first + head, own):
                self._put_rest(first + head, variants, overlay)
            else:
                busy.append(head)
        if busy:
            self.computed += variants * len(busy)
            written = self._heads(layer, busy, own, variants, found)
            for head, one in zip(busy, written, strict=True):
                put(first + head, one)
        if not graph.mlp:
            return
        sender, receiver = graph.mlp_sender(layer), graph.mlp_receiver(layer)
        if not todo[sender]:
            return
        if self._rests(sender, own):
            self._put_rest(sender, variants, overlay)
            return
        self.computed += variants
        x = own[receiver] if receiver in own else self._input(receiver, variants, found)
        put(sender, self.run_mlp(layer, x))

    def _rests(self, sender: int, own: dict[int, Tensor]) -> bool:
        """Whether no edge leads into a sender: it writes what it writes in the corrupted run. So
        it is by definition, also where a high head would round less.
        """
        inputs = self.graph.inputs_of(sender)
        return self._knows_rest and not self.mask[list(inputs)].any() and not own.keys() & set(inputs)

    def _put_rest(self, sender: int, variants: int, overlay: dict[int, Tensor] | None) -> None:
        rest = torch.zeros_like(self.deltas[0]) if self._rest is None else self._rest[sender]
        if overlay is None:
            self.deltas[sender] = rest
        else:
            overlay[sender] = rest.expand(variants, *rest.shape)

    def _heads(
        self,
        layer: int,
        heads: Sequence[int],
        own: dict[int, Tensor],
        variants: int,
        overlay: dict[int, Tensor],
    ) -> Tensor:
        """What heads of a layer write, [n, N, T, D]."""
        graph = self.graph
        kv_heads = sorted({head // graph.group for head in heads})
        receivers = [
            *(graph.q(layer, head) for head in heads),
            *(graph.k(layer, kv_head) for kv_head in kv_heads),
            *(graph.v(layer, kv_head) for kv_head in kv_heads),
        ]
        by_mask = [receiver for receiver in receivers if receiver not in own]
        distinct, which = self._inputs(by_mask, variants, overlay) if by_mask else (None, [])
        number = dict(zip(by_mask, which, strict=True))
        parts = [] if distinct is None else [distinct]
        for receiver in receivers:
            if receiver in own:
                number[receiver] = sum(len(part) for part in parts)
                parts.append(own[receiver][None])
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.run_heads(layer, heads, x, [number[receiver] for receiver in receivers])

    # ---- the arithmetic of a layer, shared with `dense` ------------------------------------------

    def run_heads(
        self, layer: int, heads: Sequence[int], x: Tensor, which: Sequence[int]
    ) -> Tensor:
        """What heads of a layer write.

        Args:
            x: distinct inputs [U, N, T, D], not normed.
            which: the input of the Q of each head, then of K and of V of each key-value head that
                these heads read, in order.

        Returns:
            [n, N, T, D]
        """
        graph, part = self.graph, self.decoder.layers[layer]
        first = graph.first_reader(layer)
        kv_heads = sorted({head // graph.group for head in heads})
        receivers = [
            *heads,
            *(graph.k(layer, kv_head) - first for kv_head in kv_heads),
            *(graph.v(layer, kv_head) - first for kv_head in kv_heads),
        ]
        normed = part.attention_norm(x).flatten(1, 2)
        made = self.projections.qkv(layer, receivers, normed, which)
        made = made.unflatten(1, x.shape[1:3])  # [n, N, T, E]
        q, k, v = made.split([len(heads), len(kv_heads), len(kv_heads)])
        q, k = part.place(q, k)
        if graph.group > 1:
            of_head = [kv_heads.index(head // graph.group) for head in heads]
            k, v = k[of_head], v[of_head]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=part.scale)
        return self.projections.out(layer, heads, mixed.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def run_mlp(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP of a layer writes for its input [N, T, D]."""
        part = self.decoder.layers[layer]
        assert part.mlp is not None and part.mlp_norm is not None
        return part.mlp(part.mlp_norm(x), self.projections.apply)


def check(decoder: Decoder, tokens: Tensor, tolerance: float = 1e-4) -> float:
    """Prove on the user's own prompts that the patched forward with all edges is the model.

    Args:
        tokens: [B, T].
        tolerance: of the logits' largest difference, relative to their largest size.

    Returns:
        That relative difference.

    Raises:
        UserError: the two differ, or the model's logits are not finite.
    """
    with torch.no_grad():
        own = decoder.logits(tokens)
        if not own.isfinite().all():
            raise UserError(f"the model ({decoder.family}) gives NaN or infinite logits")
        every = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        patched = Engine(decoder, tokens, tokens, every).logits()
    difference = float((patched - own).abs().max() / own.abs().max().clamp(min=1e-30))
    if not difference <= tolerance:
        raise UserError(
            f"the adapter for {decoder.family} does not give this model's own logits (they differ"
            f" by {difference:.1e} of their size): it is a variant that the adapter does not know"
        )
    return difference
