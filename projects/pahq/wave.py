"""New outputs of senders beside the kept ones, while a change spreads through the graph."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from projects.pahq.engine import Engine


class Wave:
    """New outputs that spread through the graph, beside the kept ones.

    Attributes:
        senders: those that have new outputs so far, in the order of `outputs`, [n, V, B, T, D].
        old_total, new_total: the sums of their kept and of their new outputs.
    """

    def __init__(self, engine: "Engine", nodes: list[int], variants: int) -> None:
        self.variants, self.senders = variants, list[int]()
        self.changed = np.zeros(engine.graph.senders, dtype=bool)
        self._engine = engine
        shape = engine.deltas.shape[1:]
        self._table = engine.room(len(nodes), variants)
        self.old_total = engine.deltas.new_zeros(shape if nodes else ())
        self.new_total = engine.deltas.new_zeros((variants, *shape) if nodes else ())

    @property
    def outputs(self) -> Tensor:
        return self._table[: len(self.senders)]

    def put(self, sender: int, written: Tensor | None) -> None:
        """What a sender writes now, [N, T, D]; None: what it writes at rest."""
        into = self._table[len(self.senders)]
        self._engine.subtract(sender, written, into)
        self.senders.append(sender)
        self.changed[sender] = True
        self.old_total += self._engine.deltas[sender]
        self.new_total += into


def mix(rows: np.ndarray, table: Tensor, total: Tensor, kept: np.ndarray | None = None) -> Tensor:
    """Sums of the entries of a table that rows ask for: of those present, or all less those
    missing, whichever are fewer.

    Args:
        rows: bool [U, n].
        table: [n, ...]; total: the sum of its entries (of those in `kept`, where given).

    Returns:
        [U, ...]
    """
    missing = ~rows
    if kept is not None:
        rows, missing = rows & kept, missing & kept
    present_columns, missing_columns = (np.flatnonzero(r.any(axis=0)) for r in (rows, missing))
    less = len(missing_columns) < len(present_columns)
    columns, signs = (missing_columns, missing) if less else (present_columns, rows)
    if not len(columns):
        return (total if less else torch.zeros_like(total)).expand(len(rows), *total.shape)
    if 2 * len(columns) < len(table):
        chosen = table[torch.from_numpy(columns).to(table.device)]
        weights = torch.from_numpy(signs[:, columns]).to(table)
    else:  # a copy of most of the table would cost more than the zeros
        chosen, weights = table, torch.from_numpy(np.ascontiguousarray(signs)).to(table)
    mixed = (weights @ chosen.flatten(1)).unflatten(1, table.shape[1:])
    return total - mixed if less else mixed
