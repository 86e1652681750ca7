"""The patched forward: every receiver has its own input, made of the senders' outputs in the
current run where an edge is present, and of their outputs in the corrupted run where it is not:

    in(r) = sum_s c_s + sum_{s: edge s -> r} (o_s - c_s)          (s before r; ACDC, section 3)

The engine keeps o_s - c_s and c_s of every sender, for the current mask and the current high heads.
A change (edges removed, another head made high) recomputes only what it reaches: the heads and MLPs
downstream of it that still have a path to the output. Nothing in front of it is computed again.

Legend of shapes: S senders, R receivers, V variants evaluated at once, B prompts, T tokens, P
scored positions of a prompt, D the residual stream, E a head, N = V B.
"""

import math
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
from projects.pahq.wave import Wave, mix
from shared.errors import UserError

Ablation = Literal["corrupted", "zero"]
# logits [V, B, P, vocabulary] -> what is minimised, [V]
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """What a change would do: the metric [V], and the senders that it reached with their new
    o_s - c_s, [n, V, B, T, D], which the next trial overwrites.
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
        deltas, corrupted: o_s - c_s and c_s, [S, B, T, D].
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
        self._plan: tuple[int, list[int]] = (-1, [])
        shape = (self.graph.senders, *clean.shape, decoder.width)
        with torch.no_grad():
            self.clean_embedding = decoder.embed(clean)
            self.mask = self.graph.full()
            self.corrupted = torch.zeros(shape, device=decoder.device)
            self.deltas = torch.zeros(shape, device=decoder.device)
            self._bases = self._streams_of(self.corrupted, biases=True)
            self._sums = self._streams_of(self.deltas)
            self._room = self.deltas.new_empty(0)
            # what a sender without edges into it writes, less c: nothing, where c is a run
            self._rest: Tensor | None = None
            self._knows_rest = False
            if ablation == "corrupted":
                # o - c while c is zero: the corrupted run itself
                self.deltas[0] = decoder.embed(corrupted)
                self._recompute()
                self.corrupted, self.deltas = self.deltas, self.corrupted
                self._bases = self._streams_of(self.corrupted, biases=True)
            else:
                self._rest = self._at_rest()
            self._knows_rest = True
            self.deltas[0] = self.clean_embedding - self.corrupted[0]
            self._recompute()

    # ---- the state -------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self.projections.policy

    @property
    def cached_bytes(self) -> int:
        """Of the activations that are kept: c and o - c of each sender, the sums of both in front
        of each receiver's place in the stream, and room for the outputs of a trial.
        """
        sums = (*self._bases.values(), *self._sums.values())
        kept = [self.corrupted, self.deltas, self._room, *sums]
        return sum(one.numel() * one.element_size() for one in kept)

    @torch.no_grad()
    def set_mask(self, mask: Mask) -> None:
        """Take this mask, bool [R, S], and recompute."""
        self.mask = mask & self.graph.full()
        self._plan = (-1, [])
        self._recompute()

    @torch.no_grad()
    def select(self, heads: Iterable[Head]) -> None:
        """Make these heads the high ones, and recompute what that changes."""
        before = self.projections.high
        self.projections.select(heads)
        changed = before ^ self.projections.high
        if not changed:
            return
        graph = self.graph
        # heads that share a key-value head with a high one have their K and V high as well
        nodes = {
            graph.head(layer, other)
            for layer, head in changed
            for other in range(
                head // graph.group * graph.group, (head // graph.group + 1) * graph.group
            )
        }
        wave = self._run(self._reached(tuple(sorted(nodes))), {}, 1)
        self._keep(wave.senders, wave.outputs, 0)

    @torch.no_grad()
    def refresh(self, heads: Iterable[Head]) -> None:
        """Make these heads the high ones and recompute everything, so that the state is a function
        of the mask and the heads alone, to the bit, whatever came before.
        """
        self.projections.select(heads)
        self._recompute()

    def remove(self, receiver: int, senders: Sequence[int], trial: Trial, variant: int = 0) -> None:
        """Remove edges for good, with a variant of the trial that removed them."""
        self.mask[receiver, list(senders)] = False
        self._keep(trial.senders, trial.deltas, variant)

    def room(self, nodes: int, variants: int) -> Tensor:
        """Memory for the outputs of a trial, [nodes, V, B, T, D], the same for all: fresh memory
        for each would cost more time than the arithmetic of a small model.
        """
        shape = (nodes, variants, *self.deltas.shape[1:])
        size = math.prod(shape)
        if len(self._room) < size:
            self._room = self.deltas.new_empty(size)
        return self._room[:size].view(shape)

    def _keep(self, senders: list[int], deltas: Tensor, variant: int) -> None:
        if senders:
            self.deltas[senders] = deltas[:, variant]
            self._sums = self._streams_of(self.deltas, self.graph.layer_of_sender(min(senders)))

    # ---- evaluation ------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the current state, at the scored positions, [B, P, vocabulary]."""
        x, _ = self._inputs([self.graph.out], Wave(self, [], 1))
        return self.unembed(x[0], 1)[0]

    @torch.no_grad()
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
        own = {receiver: self._of_rows(receiver, rows).flatten(0, 1)}
        if receiver == self.graph.out:
            return Trial(metric(self.unembed(own[receiver], variants)), [], self.deltas[:0, None])
        if self._plan[0] != receiver:
            # the receiver's own edges do not change what its node reaches
            self._plan = (receiver, self._reached(self.graph.owners(receiver)))
        wave = self._run(self._plan[1], own, variants)
        x, _ = self._inputs([self.graph.out], wave)
        return Trial(metric(self.unembed(x[0], variants)), wave.senders, wave.outputs)

    def unembed(self, x: Tensor, variants: int) -> Tensor:
        """Logits [V, B, P, vocabulary] of the output's input [N, T, D], at the scored positions."""
        batch, scored = self.positions.shape
        normed = self.decoder.final_norm(x.gather(1, self._scored(x, variants)))
        logits = self.decoder.unembed(normed, self.projections.apply)
        return logits.view(variants, batch, scored, -1)

    # ---- inputs of receivers ---------------------------------------------------------------------

    def _place(self, receiver: int) -> int:
        """Of a receiver in the stream: before the attention of a layer, before its MLP, or last."""
        graph = self.graph
        layer = graph.layer_of_receiver(receiver)
        late = graph.mlp and not graph.parallel and receiver == graph.mlp_receiver(layer)
        return 2 * layer + (late and receiver != graph.out)

    def _streams_of(
        self, outputs: Tensor, from_layer: int = -1, biases: bool = False
    ) -> dict[int, Tensor]:
        """The sum of what senders have written, at each place of the stream.

        Args:
            outputs: [S, B, T, D].
            from_layer: the sums in front of it are taken from the kept ones.
        """
        graph = self.graph
        sums = {} if from_layer < 0 else self._sums
        first = max(from_layer, 0)
        stream = outputs[0].clone() if from_layer < 0 else sums[2 * first]
        for layer in range(first, graph.layers):
            sums[2 * layer] = stream
            head = graph.head(layer, 0)
            written = stream + outputs[head : head + graph.heads].sum(0)
            bias = self.decoder.layers[layer].out_bias
            if biases and bias is not None:
                written = written + bias
            if graph.mlp:
                if not graph.parallel:
                    sums[2 * layer + 1] = written
                written = written + outputs[graph.mlp_sender(layer)]
            stream = written
        sums[2 * graph.layers] = stream
        return sums

    def base(self, receiver: int) -> Tensor:
        """The stream that a receiver sees with no edge present, [B, T, D]."""
        return self._bases[self._place(receiver)]

    def _of_rows(self, receiver: int, rows: np.ndarray) -> Tensor:
        """Inputs [U, B, T, D] of a receiver for rows [U, S] of the mask, of the kept outputs."""
        place, seen = self._place(receiver), self.graph.visible[receiver]
        mixed = mix(rows[:, :seen], self.deltas[:seen], self._sums[place])
        return self._bases[place] + mixed

    def _inputs(self, receivers: Sequence[int], wave: Wave) -> tuple[Tensor, list[int]]:
        """The distinct inputs [U, N, T, D] of receivers at one place of the stream, under the mask
        and with the outputs of a wave, and which of them each receiver has. Receivers with the same
        edges share one.
        """
        distinct: dict[bytes, int] = {}
        which = [
            distinct.setdefault(self.mask[receiver].tobytes(), len(distinct))
            for receiver in receivers
        ]
        first = [which.index(number) for number in range(len(distinct))]
        rows = self.mask[[receivers[place] for place in first]]
        place, seen = self._place(receivers[0]), self.graph.visible[receivers[0]]
        kept = ~wave.changed[:seen]
        total = self._sums[place] - wave.old_total if wave.senders else self._sums[place]
        mixed = mix(rows[:, :seen], self.deltas[:seen], total, kept)
        x = (self._bases[place] + mixed)[:, None]
        if wave.senders:
            table = wave.outputs
            x = x + mix(rows[:, wave.senders], table, wave.new_total)
        elif wave.variants > 1:
            x = x.expand(-1, wave.variants, -1, -1, -1)
        return x.flatten(1, 2), which

    # ---- recomputing -----------------------------------------------------------------------------

    def _recompute(self) -> None:
        """Every head and MLP with a path to the output, layer by layer, into the kept outputs; of
        the others, whose outputs nobody reads, o - c becomes 0.
        """
        graph = self.graph
        live = self._needed()
        stream = self.deltas[0].clone()
        nothing = Wave(self, [], 1)
        for layer in range(graph.layers):
            self._sums[2 * layer] = stream
            head = graph.head(layer, 0)
            heads = slice(head, head + graph.heads)
            has_mlp = graph.mlp and live[graph.mlp_sender(layer)]
            mlp = self._mlp_input(layer, {}, nothing) if graph.parallel and has_mlp else None
            self.deltas[[s for s in range(heads.start, heads.stop) if not live[s]]] = 0.0
            some = [sender for sender in range(heads.start, heads.stop) if live[sender]]
            for sender, one in zip(some, self._heads(layer, some, {}, nothing), strict=True):
                self.subtract(sender, one, self.deltas[sender][None])
            stream = stream + self.deltas[heads].sum(0)
            if graph.mlp:
                sender = graph.mlp_sender(layer)
                if not graph.parallel:
                    self._sums[2 * layer + 1] = stream
                    mlp = self._mlp_input(layer, {}, nothing) if has_mlp else None
                if has_mlp:
                    self.subtract(sender, self._mlp(layer, mlp), self.deltas[sender][None])
                else:
                    self.deltas[sender] = 0.0
                stream = stream + self.deltas[sender]
        self._sums[2 * graph.layers] = stream

    def _needed(self) -> np.ndarray:
        """bool [senders]: those that are computed; all while what a node writes at rest is not
        known.
        """
        if not self._knows_rest:
            return np.ones(self.graph.senders, dtype=bool)
        return self.graph.live(self.mask)

    def subtract(self, sender: int, written: Tensor | None, into: Tensor) -> None:
        """o - c of what was written [N, T, D], into [V, B, T, D]; None: what it writes at rest."""
        if written is not None:
            torch.sub(written.view(into.shape), self.corrupted[sender], out=into)
        elif self._rest is None:
            into.zero_()
        else:
            into.copy_(self._rest[sender].expand_as(into))

    def _at_rest(self) -> Tensor:
        """What each sender writes with no edge into it, less c, [S, B, T, D]."""
        mask, deltas = self.mask, self.deltas
        self.mask, self.deltas = np.zeros_like(mask), torch.zeros_like(deltas)
        self._recompute()
        rest, self.mask, self.deltas = self.deltas, mask, deltas
        return rest

    def _reached(self, nodes: tuple[int, ...]) -> list[int]:
        """`nodes` and the senders that they reach, of those with a path to the output."""
        todo = self.graph.descendants(self.mask, nodes) & self.graph.live(self.mask)
        return np.flatnonzero(todo).tolist()

    def _run(self, nodes: list[int], own: dict[int, Tensor], variants: int) -> Wave:
        """Recompute senders in the order of the stream, and keep nothing.

        Args:
            own: inputs of receivers [N, T, D] that do not follow from the mask.
        """
        graph = self.graph
        wave = Wave(self, nodes, variants)
        by_layer: dict[int, list[int]] = {}
        for node in nodes:
            by_layer.setdefault(graph.layer_of_sender(node), []).append(node)
        for layer, senders in by_layer.items():
            heads = [sender for sender in senders if graph.head_of(sender)]
            has_mlp = len(heads) < len(senders)
            early = has_mlp and graph.parallel
            mlp = self._mlp_input(layer, own, wave) if early else None
            if heads:
                for sender, one in zip(heads, self._heads(layer, heads, own, wave), strict=True):
                    wave.put(sender, one)
            if has_mlp:
                mlp = mlp if early else self._mlp_input(layer, own, wave)
                wave.put(graph.mlp_sender(layer), self._mlp(layer, mlp, variants))
        return wave

    def _rests(self, sender: int, own: dict[int, Tensor]) -> bool:
        """Whether no edge leads into a sender: it writes what it writes in the corrupted run. So
        it is by definition, also where a high head would round less.
        """
        inputs = self.graph.inputs_of(sender)
        return self._knows_rest and not (self.mask[list(inputs)].any() or own.keys() & set(inputs))

    def _mlp_input(self, layer: int, own: dict[int, Tensor], wave: Wave) -> Tensor | None:
        """[N, T, D]; None where the MLP is at rest."""
        receiver = self.graph.mlp_receiver(layer)
        if receiver in own:
            return own[receiver]
        if self._rests(self.graph.mlp_sender(layer), own):
            return None
        return self._inputs([receiver], wave)[0][0]

    def _mlp(self, layer: int, x: Tensor | None, variants: int = 1) -> Tensor | None:
        if x is None:
            return None
        self.computed += variants
        if layer < self.graph.layers - 1:
            return self.run_mlp(layer, x)
        # only the output reads the last MLP, and of it the scored positions: elsewhere o - c is 0
        index = self._scored(x, variants)
        rest = self.corrupted[self.graph.mlp_sender(layer)].repeat(variants, 1, 1)
        return rest.scatter_(1, index, self.run_mlp(layer, x.gather(1, index)))

    def _scored(self, x: Tensor, variants: int) -> Tensor:
        """The index [N, P, D] of the scored positions in x [N, T, D]."""
        return self.positions.repeat(variants, 1)[..., None].expand(-1, -1, x.shape[-1])

    def _heads(
        self, layer: int, senders: Sequence[int], own: dict[int, Tensor], wave: Wave
    ) -> list[Tensor | None]:
        """What heads of a layer write, each [N, T, D]; None where one is at rest."""
        graph = self.graph
        first = graph.head(layer, 0)
        heads = [sender - first for sender in senders if not self._rests(sender, own)]
        if not heads:
            return [None] * len(senders)
        self.computed += wave.variants * len(heads)
        kv_heads = sorted({head // graph.group for head in heads})
        receivers = [
            *(graph.q(layer, head) for head in heads),
            *(graph.k(layer, kv_head) for kv_head in kv_heads),
            *(graph.v(layer, kv_head) for kv_head in kv_heads),
        ]
        by_mask = [receiver for receiver in receivers if receiver not in own]
        parts, which = [], {}
        if by_mask:
            x, numbers = self._inputs(by_mask, wave)
            parts.append(x)
            which = dict(zip(by_mask, numbers, strict=True))
        for receiver in receivers:
            if receiver in own:
                which[receiver] = sum(len(part) for part in parts)
                parts.append(own[receiver][None])
        x = parts[0] if len(parts) == 1 else torch.cat(parts)
        written = self.run_heads(layer, heads, x, [which[receiver] for receiver in receivers])
        by_head = dict(zip(heads, written, strict=True))
        return [by_head.get(sender - first) for sender in senders]

    # ---- the arithmetic of a layer, shared with `dense` ------------------------------------------

    def run_heads(
        self, layer: int, heads: Sequence[int], x: Tensor, which: Sequence[int]
    ) -> Sequence[Tensor]:
        """What heads of a layer write.

        Args:
            x: distinct inputs [U, N, T, D], not normed.
            which: the input of the Q of each head, then of K and of V of each key-value head that
                these heads read, in order.

        Returns:
            Of each head, [N, T, D].
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
        written = self.projections.out(layer, heads, mixed.flatten(1, 2))
        return [one.unflatten(0, x.shape[1:3]) for one in written]

    def run_mlp(self, layer: int, x: Tensor) -> Tensor:
        """What the MLP of a layer writes for its input [N, T, D]."""
        part = self.decoder.layers[layer]
        assert part.mlp is not None
        assert part.mlp_norm is not None
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
