"""The computational graph of a decoder: who writes into the residual stream, who reads from it.

Senders: the embedding, every head, every MLP. Receivers: Q of every head, K and V of every
key-value head, the input of every MLP, and the output. An edge sender -> receiver exists where the
sender stands earlier in the residual stream (ACDC, Conmy et al. 2023; its direct and placeholder
edges, which only tie a receiver to its own node, are not counted). Senders are numbered in the
order of the stream, so a receiver sees the senders below a number: `visible`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shared.errors import UserError

# bool [receivers, senders]: which edges are present
Mask = np.ndarray


@dataclass(frozen=True)
class Graph:
    """A decoder's shape, as far as the graph depends on it.

    Attributes:
        kv_heads: of grouped attention; equal to `heads` where every head has its own.
        mlp: whether there are MLPs.
        parallel: attention and MLP of a layer read the same residual stream (GPT-NeoX).
    """

    layers: int
    heads: int
    kv_heads: int
    mlp: bool = True
    parallel: bool = False

    # ---- numbers of senders and receivers --------------------------------------------------------

    @property
    def senders(self) -> int:
        return 1 + self.layers * self._writers

    @property
    def receivers(self) -> int:
        return self.layers * self._readers + 1

    @property
    def out(self) -> int:
        """The number of the receiver that is the output."""
        return self.receivers - 1

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.heads // self.kv_heads

    @property
    def _writers(self) -> int:
        return self.heads + self.mlp

    @property
    def _readers(self) -> int:
        return self.heads + 2 * self.kv_heads + self.mlp

    def head(self, layer: int, head: int) -> int:
        """The sender that is a head."""
        return 1 + layer * self._writers + head

    def mlp_sender(self, layer: int) -> int:
        return 1 + layer * self._writers + self.heads

    def first_reader(self, layer: int) -> int:
        """The first receiver of a layer; its Q, K, V and MLP follow."""
        return layer * self._readers

    def q(self, layer: int, head: int) -> int:
        return layer * self._readers + head

    def k(self, layer: int, kv_head: int) -> int:
        return layer * self._readers + self.heads + kv_head

    def v(self, layer: int, kv_head: int) -> int:
        return layer * self._readers + self.heads + self.kv_heads + kv_head

    def mlp_receiver(self, layer: int) -> int:
        return layer * self._readers + self.heads + 2 * self.kv_heads

    def layer_of_receiver(self, receiver: int) -> int:
        """`layers` for the output."""
        return receiver // self._readers

    def layer_of_sender(self, sender: int) -> int:
        """-1 for the embedding."""
        return (sender - 1) // self._writers

    def head_of(self, sender: int) -> tuple[int, int] | None:
        """Layer and head of a sender; None for the embedding and MLPs."""
        layer, place = divmod(sender - 1, self._writers)
        return (layer, place) if sender and place < self.heads else None

    # ---- edges -----------------------------------------------------------------------------------

    @cached_property
    def visible(self) -> np.ndarray:
        """[receivers]: how many senders, from the first, a receiver has edges from."""
        counts = np.empty(self.receivers, dtype=np.int64)
        for layer in range(self.layers):
            first = self.first_reader(layer)
            counts[first : first + self._readers] = 1 + layer * self._writers
            if self.mlp and not self.parallel:
                counts[self.mlp_receiver(layer)] += self.heads
        counts[self.out] = self.senders
        return counts

    def full(self) -> Mask:
        """All edges."""
        return np.arange(self.senders) < self.visible[:, None]

    @property
    def edges(self) -> int:
        return int(self.visible.sum())

    def owners(self, receiver: int) -> tuple[int, ...]:
        """The senders that a receiver feeds: one, the heads of a group, or none for the output."""
        if receiver == self.out:
            return ()
        layer, place = divmod(receiver, self._readers)
        if place < self.heads:
            return (self.head(layer, place),)
        kv_head = (place - self.heads) % self.kv_heads
        if place < self.heads + 2 * self.kv_heads:
            first = kv_head * self.group
            return tuple(self.head(layer, h) for h in range(first, first + self.group))
        return (self.mlp_sender(layer),)

    def inputs_of(self, sender: int) -> tuple[int, ...]:
        """The receivers that feed a sender."""
        if sender == 0:
            return ()
        head = self.head_of(sender)
        if head is None:
            return (self.mlp_receiver(self.layer_of_sender(sender)),)
        layer, h = head
        return (self.q(layer, h), self.k(layer, h // self.group), self.v(layer, h // self.group))

    @cached_property
    def feeds(self) -> np.ndarray:
        """bool [senders, receivers]: `inputs_of` as a matrix."""
        matrix = np.zeros((self.senders, self.receivers), dtype=bool)
        for sender in range(self.senders):
            matrix[sender, list(self.inputs_of(sender))] = True
        return matrix

    def search_order(self) -> Iterator[int]:
        """Receivers from the output down: the MLP of a layer, then its heads from the last, a
        head's Q before the K and V that it reads.
        """
        yield self.out
        for layer in reversed(range(self.layers)):
            if self.mlp:
                yield self.mlp_receiver(layer)
            for kv_head in reversed(range(self.kv_heads)):
                first = kv_head * self.group
                for head in reversed(range(first, first + self.group)):
                    yield self.q(layer, head)
                yield self.k(layer, kv_head)
                yield self.v(layer, kv_head)

    def descendants(self, mask: Mask, nodes: tuple[int, ...]) -> np.ndarray:
        """bool [senders]: `nodes` and the senders that their output reaches."""
        reached = np.zeros(self.senders, dtype=bool)
        reached[list(nodes)] = True
        start = min(map(self.layer_of_sender, nodes), default=self.layers)
        for layer in range(max(start, 0), self.layers):
            readers = self._readers_of(layer)
            for some in self._writers_of(layer):
                hit = (mask[readers] & reached).any(axis=1)
                reached[some] |= (self.feeds[some, readers] & hit).any(axis=1)
        return reached

    def live(self, mask: Mask) -> np.ndarray:
        """bool [senders]: those with a path to the output."""
        alive = mask[self.out].copy()
        for layer in reversed(range(self.layers)):
            readers = self._readers_of(layer)
            for some in reversed(self._writers_of(layer)):
                needed = self.feeds[some, readers][alive[some]].any(axis=0)
                alive |= mask[readers][needed].any(axis=0)
        return alive

    def _readers_of(self, layer: int) -> slice:
        """The receivers of a layer."""
        first = self.first_reader(layer)
        return slice(first, first + self._readers)

    def _writers_of(self, layer: int) -> tuple[slice, slice]:
        """The senders of a layer: its heads, then its MLP (which may be none)."""
        first = self.head(layer, 0)
        return slice(first, first + self.heads), slice(first + self.heads, first + self._writers)

    def without_dead(self, mask: Mask) -> Mask:
        """The edges that lie on a path to the output; the others change no logit."""
        alive = self.live(mask)
        readers = self.feeds[alive].any(axis=0)
        readers[self.out] = True
        return mask & readers[:, None]

    # ---- names -----------------------------------------------------------------------------------

    def sender_name(self, sender: int) -> str:
        """emb, a3.1 (layer 3, head 1), m3."""
        if sender == 0:
            return "emb"
        head = self.head_of(sender)
        return f"a{head[0]}.{head[1]}" if head else f"m{self.layer_of_sender(sender)}"

    def receiver_name(self, receiver: int) -> str:
        """q3.1, k3.0, v3.0, m3, out."""
        if receiver == self.out:
            return "out"
        layer, place = divmod(receiver, self._readers)
        if place < self.heads:
            return f"q{layer}.{place}"
        kv_head = place - self.heads
        if kv_head < 2 * self.kv_heads:
            return f"{'kv'[kv_head // self.kv_heads]}{layer}.{kv_head % self.kv_heads}"
        return f"m{layer}"

    def sender_of(self, name: str) -> int:
        """Of a name. Raises UserError where the graph has no such node."""
        match = re.fullmatch(r"(emb)|a(\d+)\.(\d+)|m(\d+)", name)
        if match and match[1]:
            return 0
        if match and match[2] and int(match[2]) < self.layers and int(match[3]) < self.heads:
            return self.head(int(match[2]), int(match[3]))
        if match and match[4] and int(match[4]) < self.layers and self.mlp:
            return self.mlp_sender(int(match[4]))
        raise UserError(f"this model has no sender '{name}'")

    def receiver_of(self, name: str) -> int:
        """Of a name. Raises UserError where the graph has no such node."""
        found = self._receivers_by_name.get(name)
        if found is None:
            raise UserError(f"this model has no receiver '{name}'")
        return found

    @cached_property
    def _receivers_by_name(self) -> dict[str, int]:
        return {self.receiver_name(number): number for number in range(self.receivers)}
