"""PAHQ's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from projects.pahq.circuit import Circuit
from projects.pahq.graph import Graph
from projects.pahq.labels import (
    COLOURS,
    EAP,
    EFFECTS,
    FP32,
    PAHQ,
    POINT,
    RELEASED,
    RTN,
    circuit_array,
)
from projects.pahq.picture import picture
from projects.pahq.tables import pairs, times
from shared.figures import PALETTE
from shared.rows import read_array


def roc(ground_truth: pd.DataFrame) -> Figure:
    """F1: ROC curves of one seed; a circuit that nobody found is not credited."""
    rows = ground_truth[ground_truth["kind"] == POINT]
    rows = rows[rows["format"].isna() | (rows["format"] == "e4m3")]
    circuits = list(rows["circuit"].unique())
    figure, many = plt.subplots(
        1, len(circuits), figsize=(1.2 + 2.9 * len(circuits), 3.9), squeeze=False, sharey=True
    )
    widths = {FP32: 4.5, PAHQ: 2.6, RTN: 1.4}
    for axes, name in zip(many[0], circuits, strict=True):
        for method in (FP32, PAHQ, RTN, RELEASED, EAP):
            own = rows[(rows["circuit"] == name) & (rows["method"] == method)]
            axes.step(
                own["false_positive_rate"],
                own["true_positive_rate"],
                where="post",
                color=PALETTE[COLOURS[method]],
                linewidth=widths.get(method, 1.8),
                label=method,
            )
        axes.set(xlabel="false positive rate", title=name, xlim=(-0.03, 1.03), ylim=(-0.03, 1.05))
    many[0][0].set_ylabel("true positive rate")
    figure.legend(*many[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def effects(trained: pd.DataFrame) -> Figure:
    """Error of effects with PAHQ over that with everything low, a point for each trained model."""
    error = pairs(trained, EFFECTS)["effect_error"]
    ratios = (error[PAHQ] / error[RTN]).rename("ratio").reset_index()
    cells = ratios[["task", "format"]].drop_duplicates().to_numpy().tolist()
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    colours = dict(
        zip(ratios["format"].unique(), ("blue", "orange", "green", "black"), strict=False)
    )
    for place, (task, form) in enumerate(cells):
        own = ratios[(ratios["task"] == task) & (ratios["format"] == form)]["ratio"]
        colour = PALETTE[colours[form]]
        label = form if place == [cell[1] for cell in cells].index(form) else None
        axes.plot(own, np.full(len(own), place), "o", color=colour, alpha=0.55, label=label)
        axes.plot([own.mean()], [place], "|", color=colour, markersize=22, markeredgewidth=2.5)
    axes.axvline(1.0, color=PALETTE["black"], linewidth=1)
    axes.set_yticks(range(len(cells)), [task for task, _ in cells])
    axes.invert_yaxis()
    axes.set(xlabel="error with PAHQ / error with all low", title="Effects of single edges")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    return figure


def steps(speed: pd.DataFrame) -> Figure:
    """What an evaluation costs with one saving after the other."""
    rows = speed[speed["kind"] == "step"].sort_values("place", kind="stable")
    names = list(rows["variant"].unique())
    medians = [float(np.median(times(rows, name))) for name in names]
    figure, axes = plt.subplots(figsize=(7.4, 3.6))
    colours = [PALETTE["blue" if "int8" in name else "black"] for name in names]
    bars = axes.barh(range(len(names)), [1000 * value for value in medians], color=colours)
    axes.bar_label(bars, [f"{1000 * value:.0f} ms" for value in medians], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set(xlabel="one evaluation, ms", title="Where the time goes")
    return figure


def circuit(pretrained: pd.DataFrame) -> Figure:
    """PAHQ's circuit of the first task."""
    row = pretrained[pretrained["method"] == PAHQ].iloc[0]
    graph = Graph(*(int(row[name]) for name in ("layers", "heads", "kv_heads")), bool(row["mlp"]))
    edges = read_array(pretrained, circuit_array(row["task"], row["scope"]))
    effects = np.full((graph.receivers, graph.senders), np.nan)
    receivers, senders = edges[:, :2].astype(int).T
    effects[receivers, senders] = edges[:, 2]
    return picture(Circuit(graph, ~np.isnan(effects), effects, {}))
