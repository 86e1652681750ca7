"""Key-value caches of a fixed size whose rows stand at different positions, for any decoder of
transformers, unpatched.

Legend: S slots (rows), H key-value heads, T token slots of a row, D head size, N token slots of a
pool.

`SlotCache` is static: a row per slot, allocated once. The prompt's keys and values are *copied*
into each slot (broadcast). Its last column is a scratch place to which idle rows write; no token
needs it, as the last one of a completion is never fed back.

`PagedCache` is a pool of pages with a table per row. The prompt's whole pages are *physically
shared* by the rows of its group. A layer's rows are gathered into one tensor while that layer
attends, so that the extra is one layer's and not the model's.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Prefix = list[tuple[Tensor, Tensor]]  # for each layer keys and values [1, H, tokens, D]


class _Layer(CacheLayerMixin):
    """One layer's storage; where to write and what to return is the owner's affair."""

    is_sliding = False
    is_compileable = False

    def __init__(self, owner: "_Rows", index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: storage is made when the prompt's shapes are known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.owner.exchange(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.width, 0

    def get_seq_length(self) -> int:
        return self.owner.width

    def get_max_length(self) -> int:
        return self.owner.capacity


class _Rows(Cache, ABC):
    """What both caches share: `select` says which rows the next forward is about."""

    def __init__(self, layers: int) -> None:
        self.width = 0
        self.capacity = 0
        super().__init__(layers=[_Layer(self, index) for index in range(layers)])

    @abstractmethod
    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [rows, H, tokens, D]; return all that the rows attend to,
        [rows, H, width, D].
        """

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""


class SlotCache(_Rows):
    """S rows of T token slots per layer."""

    def __init__(self, shapes: Prefix, slots: int, tokens: int) -> None:
        """Allocate.

        Args:
            shapes: a prompt's keys and values, for heads, head sizes, dtype and device of each
                layer.
            slots: S.
            tokens: T, the longest prompt and the most new tokens.
        """
        super().__init__(len(shapes))
        self.capacity = tokens
        self.storage = [
            tuple(x.new_zeros(slots, x.shape[1], tokens, x.shape[3]) for x in pair)
            for pair in shapes
        ]
        self.writes = torch.zeros(0, dtype=torch.int64)
        self.rows: Tensor | None = None
        self._all = torch.arange(slots, device=shapes[0][0].device)

    def select(self, writes: Tensor, width: int, rows: Tensor | None = None) -> None:
        """The next forward is about `rows` (the first ones); their new tokens go to `writes` [rows,
        new]; they see `width` token slots.
        """
        self.rows, self.writes, self.width = rows, writes, width

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.writes)
        rows = (self._all[:count] if self.rows is None else self.rows)[:, None]
        found = []
        for storage, new in zip(self.storage[layer], (keys, values), strict=True):
            # under autocast values may be narrower than the prompt's, which a cache has widened
            storage[rows, :, self.writes] = new.transpose(1, 2).to(storage.dtype)
            seen = storage[:, :, : self.width]
            found.append(seen[:count] if self.rows is None else seen[self.rows])
        return found[0], found[1]

    def load(self, slot: int, prompt: Prefix) -> None:
        """Copy a prompt's keys and values into a slot."""
        for pair, given in zip(self.storage, prompt, strict=True):
            for storage, tensor in zip(pair, given, strict=True):
                storage[slot, :, : tensor.shape[2]] = tensor[0]

    def copy(self, source: int, target: int) -> None:
        """Copy all of a slot into another."""
        for pair in self.storage:
            for storage in pair:
                storage[target] = storage[source]

    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for pair in self.storage for tensor in pair)


class PagedCache(_Rows):
    """A pool of pages of `page` token slots per layer; one further page is scratch."""

    def __init__(self, shapes: Prefix, pages: int, page: int) -> None:
        super().__init__(len(shapes))
        self.page, self.pages = page, pages
        self.capacity = pages * page
        self.free = list(range(pages - 1, -1, -1))
        self.users = [0] * (pages + 1)
        size = (pages + 1) * page
        self.storage = [
            tuple(x.new_zeros(x.shape[1], size, x.shape[3]) for x in pair) for pair in shapes
        ]
        self.scratch = pages * page
        self.reads = torch.zeros(0, 0, dtype=torch.int64)
        self.writes = torch.zeros(0, 0, dtype=torch.int64)

    def select(self, reads: Tensor, writes: Tensor) -> None:
        """The next forward: places in the pool that rows read [rows, width] and to which new tokens
        go [rows, new].
        """
        self.reads, self.writes, self.width = reads, writes, reads.shape[1]

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for storage, new in zip(self.storage[layer], (keys, values), strict=True):
            flat = new.transpose(0, 1).flatten(1, 2)
            storage[:, self.writes.flatten()] = flat.to(storage.dtype)
            gathered = storage[:, self.reads.flatten()].unflatten(1, self.reads.shape)
            found.append(gathered.transpose(0, 1))
        return found[0], found[1]

    def take(self) -> int | None:
        """A page with one user, or None when there is none."""
        if not self.free:
            return None
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, pages: list[int]) -> None:
        """One more user for each of the pages."""
        for page in pages:
            self.users[page] += 1

    def release(self, pages: list[int]) -> None:
        """One user fewer; a page without any is free."""
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free.append(page)

    def write(self, pages: list[int], prefix: Prefix, first: int = 0) -> None:
        """Put a prefix's tokens from number `first` on into pages."""
        tokens = prefix[0][0].shape[2] - first
        places = torch.tensor(
            [page * self.page + offset for page in pages for offset in range(self.page)][:tokens]
        )
        for pair, given in zip(self.storage, prefix, strict=True):
            for storage, tensor in zip(pair, given, strict=True):
                storage[:, places.to(storage.device)] = tensor[0, :, first:]

    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for pair in self.storage for tensor in pair)


def token_bytes(shapes: Prefix) -> int:
    """Bytes of one token's keys and values in all layers (c in README.md)."""
    return sum(x.shape[1] * x.shape[3] * x.element_size() for pair in shapes for x in pair)
