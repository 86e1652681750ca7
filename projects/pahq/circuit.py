"""A circuit on disk: `edges.parquet` (every edge that was tested, its effect, whether it stayed),
`edges.json` (those that stayed), `circuit.json` (of which model, found how) and `circuit.svg`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from projects.pahq.graph import Graph, Mask
from shared.errors import UserError
from shared.files import atomic_json, read_json, replacing

FILES = ("edges.parquet", "edges.json", "circuit.svg", "circuit.json")


@dataclass(frozen=True)
class Circuit:
    """What a search left.

    Attributes:
        mask: bool [receivers, senders]; effects: of the edges tested, NaN elsewhere.
        about: the model's family and fingerprint, the recipe, the floor.
    """

    graph: Graph
    mask: Mask
    effects: np.ndarray
    about: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write all files; `circuit.json` is last, and says that the others are there."""
        from projects.pahq.picture import draw

        table = self.table()
        with replacing(folder / "edges.parquet") as path:
            table.to_parquet(path, index=False)
        kept = table[table["kept"]]
        atomic_json(
            folder / "edges.json",
            [
                {"sender": s, "receiver": r, "effect": None if e != e else e}
                for s, r, e in zip(kept["sender"], kept["receiver"], kept["effect"], strict=True)
            ],
        )
        draw(self, folder / "circuit.svg")
        atomic_json(folder / "circuit.json", {"graph": asdict(self.graph), **self.about})

    def table(self) -> pd.DataFrame:
        """A line for each edge that was tested or kept, the strongest first."""
        known = np.argwhere(self.mask | ~np.isnan(self.effects))
        frame = pd.DataFrame(
            {
                "sender": [self.graph.sender_name(s) for _, s in known],
                "receiver": [self.graph.receiver_name(r) for r, _ in known],
                "effect": [float(self.effects[r, s]) for r, s in known],
                "kept": [bool(self.mask[r, s]) for r, s in known],
            }
        )
        return frame.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def load(folder: Path) -> Circuit:
    """A circuit that `Circuit.save` wrote.

    Raises:
        UserError: there is none, or it is damaged.
    """
    about = read_json(folder / "circuit.json")
    if about is None:
        raise UserError(f"{folder} holds no circuit (circuit.json); discover makes one")
    try:
        graph = Graph(**about.pop("graph"))
        frame = pd.read_parquet(folder / "edges.parquet")
        places = (
            [graph.receiver_of(name) for name in frame["receiver"]],
            [graph.sender_of(name) for name in frame["sender"]],
        )
        mask = np.zeros((graph.receivers, graph.senders), dtype=bool)
        effects = np.full(mask.shape, np.nan)
        mask[places], effects[places] = frame["kept"], frame["effect"]
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        json.JSONDecodeError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder} holds a damaged circuit: {reason}") from None
    return Circuit(graph, mask, effects, about)
