"""Image-text pairs in fixed batches. The partition is part of what a score means: a pair's
negatives are those of its own batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.influence.retrain import check_removed
from shared.seeding import step_seed


@dataclass(frozen=True, eq=False)
class Pairs:
    """n pairs in m batches of B places. Make it with `Pairs.of`.

    Attributes:
        inputs: tensors [m, B, ...], what the towers take; an empty place repeats another pair's.
        present: [m, B] of bool: whether a place holds a pair.
        order: [n], the place m B + b of each pair.
    """

    inputs: tuple[Tensor, ...]
    present: Tensor
    order: Tensor

    @classmethod
    def of(
        cls,
        inputs: Sequence[Tensor],
        batch: int,
        seed: int | None = 0,
        apart: Sequence[object] | None = None,
    ) -> "Pairs":
        """Put pairs into batches, in a random order that only `seed` and n decide, or in their own
        (None). The last batch may be short.

        Args:
            inputs: tensors [n, ...], what the towers take.
            batch: places of a batch.
            apart: a label of each pair, as its caption. Pairs of one label come into different
                batches, as far as there are batches: they would be false negatives of one another.
                Batches are then of equal size, but for one pair.

        Raises:
            UserError: tensors of different lengths, no pairs, or a batch without places.
        """
        sizes = {len(part) for part in inputs}
        if len(sizes) != 1:
            raise UserError(
                "texts and images do not pair up: there are"
                f" {' and '.join(map(str, sorted(sizes)))} of them"
            )
        n = sizes.pop()
        if n == 0:
            raise UserError("there are no pairs")
        if batch < 1:
            raise UserError(f"a batch holds at least 1 pair, not {batch}")
        places = -(-n // batch) * batch
        shuffled = (
            np.arange(n)
            if seed is None
            else np.random.default_rng(step_seed(seed, "batches", n)).permutation(n)
        )
        where = np.arange(n)
        if apart is not None:
            # label after label is dealt to the batches in turn
            shuffled = shuffled[_by_label([apart[i] for i in shuffled])]
            where = where % (places // batch) * batch + where // (places // batch)
        filled, there = np.resize(shuffled, places), np.zeros(places, dtype=bool)
        filled[where], there[where] = shuffled, True
        order = np.empty(n, dtype=np.int64)
        order[shuffled] = where
        device = inputs[0].device
        places_of = torch.from_numpy(filled).to(device)
        return cls(
            tuple(part[places_of].unflatten(0, (-1, batch)) for part in inputs),
            torch.from_numpy(there).view(-1, batch).to(device),
            torch.from_numpy(order).to(device),
        )

    @property
    def n(self) -> int:
        return len(self.order)

    @property
    def batches(self) -> int:
        return self.present.shape[0]

    @property
    def data(self) -> tuple[Tensor, ...]:
        """Inputs and presence, one row a batch: the samples of `shared.influence`."""
        return (*self.inputs, self.present)

    def mask(self, removed: Iterable[int]) -> Tensor:
        """[m, B] of bool: the places of these pairs. UserError for a pair that is not there or is
        named twice.
        """
        ids = torch.tensor(
            check_removed(removed, self.n), dtype=torch.long, device=self.order.device
        )
        found = torch.zeros_like(self.present)
        found.view(-1)[self.order[ids]] = True
        return found

    def without(self, removed: Iterable[int]) -> "Pairs":
        """The same batches with these places empty: nobody moves up."""
        return Pairs(self.inputs, self.present & ~self.mask(removed), self.order)

    def by_pair(self, values: Tensor) -> Tensor:
        """Values of places [m, B, ...] as values of pairs, in the pairs' own order, [n, ...]."""
        return values.flatten(0, 1)[self.order]

    def repeated_share(self, captions: Sequence[str]) -> float:
        """The share of pairs whose caption another pair of their batch has too: false negatives of
        the loss.
        """
        batch_of = (self.order // self.present.shape[1]).tolist()
        seen: dict[tuple[int, str], int] = {}
        for key in zip(batch_of, captions, strict=True):
            seen[key] = seen.get(key, 0) + 1
        return sum(count for count in seen.values() if count > 1) / self.n


def _by_label(labels: Sequence[object]) -> NDArray[np.int64]:
    """Positions of equal labels after one another, in the order of each label's first position."""
    first = {label: place for place, label in reversed(list(enumerate(labels)))}
    return np.argsort([first[label] for label in labels], kind="stable")
