"""Where the full-precision slices of the investigated head come from.

Resident: they are on the device all the time, and nothing is brought. On demand: they lie in pinned
host memory, one head has room on the device, and it is brought when it is asked for. Prefetched:
there is room for two, and the next head is brought on a stream of its own while the edges of this
one are tested. One upload serves all edges of a head.

What is brought are the slices of a key-value head: the Q of its group, its K and V, and what its
heads write where that is low too. They are one contiguous piece of host memory, so that an upload
is one copy.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from projects.pahq.decoder import Decoder

Placement = Literal["resident", "on demand", "prefetched"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
Head = tuple[int, int]  # layer, head


class Masters(Protocol):
    """Full-precision weights of heads."""

    uploads: int
    uploaded_bytes: int

    def qkv(self, layer: int, receivers: Sequence[int]) -> Tensor:
        """[n, E, D] of receivers of a layer, by their numbers within it."""

    def out(self, layer: int, head: int) -> Tensor:
        """[E, D]."""

    def use(self, head: Head | None, after: Head | None = None) -> None:
        """Bring a head, and begin to bring the one that comes after it."""


class Resident:
    """All on the device, as part of the decoder."""

    uploads = 0
    uploaded_bytes = 0

    def __init__(self, decoder: Decoder) -> None:
        self._layers = decoder.layers

    def qkv(self, layer: int, receivers: Sequence[int]) -> Tensor:
        weight = self._layers[layer].qkv
        return weight if len(receivers) == weight.shape[0] else weight[list(receivers)]

    def out(self, layer: int, head: int) -> Tensor:
        return self._layers[layer].out[head]

    def use(self, head: Head | None, after: Head | None = None) -> None:
        pass


class Uploaded:
    """In host memory, the heads of one key-value head at a time on the device.

    Every head that is high must have been brought by `use`: a policy that follows senders as well
    keeps its masters resident.

    Args:
        device: where slices are used.
        prefetch: bring the next head while this one is in use; room for two.
        outputs: whether what heads write is high as well (every scope but qkv).

    Attributes:
        uploads, uploaded_bytes: copies to the device so far.
        waits: uploads that began only when they were needed.
        room_bytes: of the device, for slices.
        host_bytes: of pinned memory, for all heads.
    """

    def __init__(
        self, decoder: Decoder, device: torch.device, prefetch: bool, outputs: bool
    ) -> None:
        graph = decoder.graph
        self.graph, self.device, self.prefetch = graph, device, prefetch
        self.uploads = self.uploaded_bytes = self.waits = 0
        on_gpu = device.type == "cuda"
        self._host: dict[Head, Tensor] = {}
        for layer, part in enumerate(decoder.layers):
            for kv_head in range(graph.kv_heads):
                first = kv_head * graph.group
                slices = [part.qkv[row] for row in self._receivers(kv_head)]
                if outputs:
                    slices.extend(part.out[first : first + graph.group])
                shape = (len(slices), *part.out.shape[1:])
                piece = torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu)
                for target, source in zip(piece, slices, strict=True):
                    target.copy_(source.detach())
                self._host[layer, kv_head] = piece
        rooms = 2 if prefetch else 1
        self._rooms = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(rooms)]
        self._holds: list[Head | None] = [None] * rooms
        self._current = 0
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        # of each room: its bytes have come (recorded on the side stream)
        self._come: dict[int, torch.cuda.Event] = {}
        self.room_bytes = sum(room.numel() * room.element_size() for room in self._rooms)
        self.host_bytes = sum(p.numel() * p.element_size() for p in self._host.values())

    def _receivers(self, kv_head: int) -> list[int]:
        """Of a key-value head, within a layer: its Q, then K, then V."""
        graph = self.graph
        first = kv_head * graph.group
        k = graph.heads + kv_head
        return [*range(first, first + graph.group), k, k + graph.kv_heads]

    def use(self, head: Head | None, after: Head | None = None) -> None:
        """Make `head` the one whose slices `qkv` and `out` give, and begin to bring `after`."""
        if head is None:
            return
        wanted, later = self._key(head), None if after is None else self._key(after)
        if wanted not in self._holds:
            self.waits += 1
            self._bring(wanted, self._other_room())
        self._current = self._holds.index(wanted)
        if self._current in self._come:
            torch.cuda.current_stream(self.device).wait_event(self._come[self._current])
        if self.prefetch and later is not None and later not in self._holds:
            self._bring(later, self._other_room())

    def _key(self, head: Head) -> Head:
        return head[0], head[1] // self.graph.group

    def _other_room(self) -> int:
        return (self._current + 1) % len(self._rooms)

    def _bring(self, key: Head, room: int) -> None:
        source, target = self._host[key], self._rooms[room]
        if self._stream is None:
            target.copy_(source)
        else:
            # what was queued with the room's old content comes before it is overwritten
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
                self._come[room] = self._stream.record_event()
        self._holds[room] = key
        self.uploads += 1
        self.uploaded_bytes += source.numel() * source.element_size()

    def _room(self, layer: int, kv_head: int) -> Tensor:
        assert self._holds[self._current] == (layer, kv_head), "a high head was not brought"
        return self._rooms[self._current]

    def qkv(self, layer: int, receivers: Sequence[int]) -> Tensor:
        graph = self.graph
        first = receivers[0]
        kv_head = (
            first // graph.group if first < graph.heads else (first - graph.heads) % graph.kv_heads
        )
        rows = self._receivers(kv_head)
        places = [rows.index(receiver) for receiver in receivers]
        room = self._room(layer, kv_head)
        return room[: len(rows)] if places == [*range(len(rows))] else room[places]

    def out(self, layer: int, head: int) -> Tensor:
        graph = self.graph
        room = self._room(layer, head // graph.group)
        return room[graph.group + 2 + head % graph.group]


def masters(
    decoder: Decoder, placement: Placement, device: torch.device, outputs: bool = False
) -> Masters:
    """The masters of a decoder in a placement; `outputs` as `Uploaded` takes it."""
    if placement == "resident":
        return Resident(decoder)
    return Uploaded(decoder, device, placement == "prefetched", outputs)
