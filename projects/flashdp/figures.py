"""FlashDP's figures: rows in, matplotlib `Figure` out."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.flashdp import labels
from projects.flashdp.tables import speeds
from shared.figures import PALETTE

LINES = {
    labels.NON_PRIVATE: {"linestyle": "--"},
    labels.FLASHDP: {"linewidth": 2.5, "zorder": 5},
    labels.OPACUS_FGC: {"linestyle": ":"},
    labels.GHOST_CLIP: {"linestyle": ":"},
    labels.BOOK_KEEPING: {"linestyle": ":"},
}


def _look(method: str) -> dict[str, Any]:
    """How a method's line is drawn."""
    return {"color": PALETTE[labels.COLOURS[method]], **LINES.get(method, {})}


def _against(frame: pd.DataFrame, column: str, label: str) -> Figure:
    """Throughput and extra memory of a step over the non-private ones, against a column."""
    found = speeds(frame)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9))
    for method in labels.METHODS:
        look = _look(method)
        rows = found[found["method"] == method]
        if rows.empty:
            continue
        left.plot(
            rows[column],
            100 * rows["throughput_share"],
            marker="o",
            markersize=4,
            label=method,
            **look,
        )
        right.plot(rows[column], rows["memory_ratio"], marker="o", markersize=4, **look)
    ticks = sorted(found[column].unique())
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
    left.set(ylabel="throughput, % of non-private", ylim=(0, None), title="Throughput")
    right.set(ylabel="extra memory over non-private", ylim=(0, None), title="Memory")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def batch_size(batch_size: pd.DataFrame) -> Figure:
    """Throughput and memory against the batch size."""
    return _against(
        batch_size[batch_size["model"] == batch_size["model"].iloc[0]], "batch_size", "batch size"
    )


def sequence_length(sequence_length: pd.DataFrame) -> Figure:
    """Throughput and memory against the sequence length, at one number of tokens."""
    return _against(
        sequence_length[sequence_length["model"] == sequence_length["model"].iloc[0]],
        "tokens",
        "tokens in a sequence",
    )


def utility(utility: pd.DataFrame) -> Figure:
    """Training loss at several epsilon, the mean over seeds; explicit clipping lies on FlashDP."""
    steps = utility[utility["kind"] == "step"]
    figure, axes = plt.subplots()
    colours = iter((PALETTE["green"], PALETTE["blue"], PALETTE["purple"], PALETTE["orange"]))
    for (method, epsilon), rows in steps.groupby(
        ["method", steps["target_epsilon"].fillna(float("inf"))], sort=False
    ):
        curve = (
            rows[rows["seed"] == 0].set_index("step")["train_loss"]
            if method == labels.EXPLICIT
            else rows.groupby("step")["train_loss"].mean()
        )
        if method == labels.EXPLICIT:
            axes.plot(
                curve.index,
                curve,
                color="#999999",
                linewidth=6,
                alpha=0.5,
                zorder=1,
                label=f"explicit, ε = {epsilon:g}, seed 0",
            )
            same = steps[
                (steps["method"] == labels.FLASHDP)
                & (steps["target_epsilon"] == epsilon)
                & (steps["seed"] == 0)
            ]
            axes.plot(
                same["step"],
                same["train_loss"],
                color=PALETTE["black"],
                linewidth=1,
                label=f"FlashDP, ε = {epsilon:g}, seed 0",
            )
        elif method == labels.NON_PRIVATE:
            axes.plot(
                curve.index, curve, color=PALETTE["black"], linestyle="--", label=labels.NON_PRIVATE
            )
        elif method == labels.FLASHDP:
            axes.plot(curve.index, curve, color=next(colours), label=f"FlashDP, ε = {epsilon:g}")
        else:
            axes.plot(
                curve.index,
                curve,
                color=PALETTE["amber"],
                linestyle=":",
                label=f"{method}, ε = {epsilon:g}",
            )
    axes.set(xlabel="step", ylabel="training loss in nats", title="Loss at several ε")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def crossover(crossover: pd.DataFrame) -> Figure:
    """Time of each backend over the plain weight gradient against the sequence length; dashed, what
    the cost model predicts.
    """
    shape = crossover[["rows", "columns"]].drop_duplicates().iloc[0]
    shown = crossover[
        (crossover["rows"] == shape["rows"]) & (crossover["columns"] == shape["columns"])
    ]
    times = shown.pivot_table(index=["tokens", "repeat"], columns="backend", values="layer_seconds")
    predicted = shown.groupby(["backend", "tokens"])["predicted_ratio"].first()
    figure, axes = plt.subplots()
    for backend in [name for name in labels.BACKEND_COLOURS if name in times.columns]:
        measured = (times[backend] / times["plain"]).groupby("tokens").median()
        axes.plot(
            measured.index,
            measured,
            marker="o",
            color=PALETTE[labels.BACKEND_COLOURS[backend]],
            label=backend,
        )
        axes.plot(
            measured.index,
            predicted[backend].reindex(measured.index),
            linestyle="--",
            linewidth=1,
            color=PALETTE[labels.BACKEND_COLOURS[backend]],
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in a sequence",
        ylabel="time over the plain product",
    )
    axes.set_title(f"One layer of {shape['rows']} x {shape['columns']}; dashed: predicted")
    ticks = sorted(shown["tokens"].unique())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4)
    return figure
