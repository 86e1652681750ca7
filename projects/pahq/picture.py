"""The picture of a circuit: a row for each layer that is in it, upward; a line for each edge, its
colour for what it enters and its width for its effect.
"""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.figures import PALETTE, style
from shared.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from projects.pahq.circuit import Circuit

COLOURS = {"q": "blue", "k": "orange", "v": "green", "m": "purple", "o": "black"}
MEANING = {"q": "into Q", "k": "into K", "v": "into V", "m": "into an MLP", "o": "into the output"}
MOST = 300  # more edges are no picture; the strongest are drawn


def draw(circuit: "Circuit", path: str | Path) -> None:
    """Write the picture as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with style():
        figure = picture(circuit)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    atomic_write(Path(path), buffer.getvalue())


def picture(circuit: "Circuit") -> "Figure":
    """The picture, in the style that is set."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch

    graph = circuit.graph
    edges, dropped = _edges(circuit)
    places = _places(circuit, edges)
    width = max((x for x, _ in places.values()), default=0.0)
    height = max((y for _, y in places.values()), default=1.0)
    size = (min(14.0, max(6.0, 1.1 * width + 3.0)), min(18.0, max(3.5, 0.95 * height + 1.8)))
    figure, axes = plt.subplots(figsize=size)
    axes.set_axis_off()
    strongest = max((effect for *_, effect in edges), default=1.0) or 1.0
    shown: dict[str, FancyArrowPatch] = {}
    for sender, receiver, effect in sorted(edges, key=lambda edge: edge[2]):
        owners = [graph.sender_name(owner) for owner in graph.owners(receiver)] or ["out"]
        letter = graph.receiver_name(receiver)[0]
        for owner in owners:
            if owner not in places:
                continue
            (x0, y0), (x1, y1) = places[graph.sender_name(sender)], places[owner]
            # a straight line through other nodes of the same column would hide behind them
            bend = 0.0 if abs(x0 - x1) > 0.3 or y1 - y0 < 1.5 else 0.25
            line = FancyArrowPatch(
                (x0, y0 + 0.16), (x1, y1 - 0.16), arrowstyle="-|>", mutation_scale=7,
                connectionstyle=f"arc3,rad={bend}", color=PALETTE[COLOURS[letter]],
                linewidth=0.6 + 2.6 * (effect / strongest) ** 0.5, alpha=0.65, zorder=1,
            )  # fmt: skip
            axes.add_patch(line)
            shown.setdefault(letter, line)
    for name, (x, y) in places.items():
        axes.text(
            x, y, name, ha="center", va="center", fontsize=9, zorder=2,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#888888"},
        )  # fmt: skip
    for y in sorted({y for _, y in places.values()}):
        axes.text(-1.1, y, _row_name(circuit, places, y), fontsize=8, color="#666666", va="center")
    axes.set(xlim=(-1.2, width + 0.8), ylim=(-0.6, height + 0.6))
    note = f", the strongest {len(edges)} of them drawn" if dropped else ""
    axes.set_title(f"{int(circuit.mask.sum())} of {graph.edges:,} edges{note}")
    order = [letter for letter in COLOURS if letter in shown]
    if order:
        figure.legend(
            [shown[letter] for letter in order], [MEANING[letter] for letter in order],
            loc="outside lower center", ncols=len(order),
        )  # fmt: skip
    return figure


def _edges(circuit: "Circuit") -> tuple[list[tuple[int, int, float]], bool]:
    """Sender, receiver and effect of the edges to draw, and whether others are left out."""
    found = [
        (int(s), int(r), float(np.nan_to_num(abs(circuit.effects[r, s]))))
        for r, s in np.argwhere(circuit.mask)
    ]
    strongest = sorted(found, key=lambda edge: -edge[2])[:MOST]
    return strongest, len(found) > MOST


def _places(
    circuit: "Circuit", edges: list[tuple[int, int, float]]
) -> dict[str, tuple[float, float]]:
    """Where each node of the edges stands: rows without nodes take no room."""
    graph = circuit.graph
    nodes = {sender for sender, *_ in edges}
    for _, receiver, _ in edges:
        owners = graph.owners(receiver)
        # of a group's heads those that go on are drawn
        nodes |= {owner for owner in owners if len(owners) == 1 or owner in nodes}
    rows: dict[int, list[int]] = {}
    for node in sorted(nodes):
        layer = graph.layer_of_sender(node)
        level = 0 if node == 0 else 1 + 2 * layer + (graph.head_of(node) is None)
        rows.setdefault(level, []).append(node)
    widest = max((len(row) for row in rows.values()), default=1)
    places: dict[str, tuple[float, float]] = {}
    for y, level in enumerate(sorted(rows)):
        row = rows[level]
        gap = (widest - 1) / max(len(row) - 1, 1) if len(row) > 1 else 0.0
        start = 0.0 if len(row) > 1 else (widest - 1) / 2 + (0.35 if y % 2 else -0.35)
        for number, node in enumerate(row):
            places[graph.sender_name(node)] = (start + number * gap, float(y))
    if any(receiver == graph.out for _, receiver, _ in edges):
        places["out"] = ((widest - 1) / 2, float(len(rows)))
    return places


def _row_name(circuit: "Circuit", places: dict[str, tuple[float, float]], y: float) -> str:
    names = [name for name, (_, at) in places.items() if at == y]
    if names[0] in ("emb", "out"):
        return {"emb": "tokens", "out": "logits"}[names[0]]
    layer = circuit.graph.layer_of_sender(circuit.graph.sender_of(names[0]))
    return f"layer {layer}"
