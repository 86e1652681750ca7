"""ECIF's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from projects.ecif.labels import (
    COLOURS,
    GALLERY,
    GAUSS_NEWTON,
    HESSIAN,
    IDENTITY,
    KINDS,
    LOGRA,
    NO_REMOVAL,
    RETRAIN,
    VARIANTS,
)
from projects.ecif.tables import mean
from shared.figures import PALETTE
from shared.rows import read_array


def curves(removal: pd.DataFrame) -> Figure:
    """Figure 1: test accuracy and test loss after retraining without more and more pairs, on the
    data set of which most shares were removed.
    """
    name = removal.groupby("dataset", sort=False)["share"].nunique().idxmax()
    rows = removal[(removal["dataset"] == name) & removal["method"].isin([RETRAIN, NO_REMOVAL])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9))
    for axes, column, scale in ((left, "test_accuracy", 100), (right, "test_loss", 1)):
        for kind, colour in KINDS.items():
            own = rows[rows["kind"].isin([kind, "none"])]
            means = (
                own.groupby(["share", "seed"])[column]
                .mean()
                .groupby("share")
                .apply(lambda one: mean(one.to_numpy()))
            )
            value, low, high = (
                scale * np.array([getattr(one, part) for one in means])
                for part in ("value", "low", "high")
            )
            axes.plot(100 * means.index, value, marker="o", color=PALETTE[colour], label=kind)
            axes.fill_between(
                100 * means.index, low, high, color=PALETTE[colour], alpha=0.12, linewidth=0
            )
    left.set(xlabel="removed, %", ylabel="test accuracy, %", title=f"Removal: {name}")
    right.set(xlabel="removed, %", ylabel="test loss of a pair", title="and the loss")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def misalignment(misalignment: pd.DataFrame) -> Figure:
    """Figure 2: AUROC of finding exchanged captions, by data set and share of exchanged ones."""
    found = misalignment[misalignment["detection_auc"].notna()]
    cells = found[["dataset", "shuffled_share"]].drop_duplicates().to_numpy()
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    shown = {name: colour for name, colour in COLOURS.items() if (found["method"] == name).any()}
    for number, (method, colour) in enumerate(shown.items()):
        at, values, below, above = [], [], [], []
        for place, (dataset, share) in enumerate(cells):
            one = mean(
                found.loc[
                    (found["dataset"] == dataset)
                    & (found["shuffled_share"] == share)
                    & (found["method"] == method),
                    "detection_auc",
                ]
            )
            at.append(place + 0.1 * (number - len(shown) / 2 + 0.5))
            values.append(one.value)
            below.append(one.value - one.low)
            above.append(one.high - one.value)
        axes.errorbar(
            at,
            values,
            [below, above],
            fmt="o",
            color=PALETTE[colour],
            label=method,
            markersize=5,
            linewidth=1.4,
        )
    axes.axhline(0.5, color="#999999", linewidth=1, linestyle="--")
    axes.set_xticks(
        range(len(cells)), [f"{dataset}\n{share:.0%} exchanged" for dataset, share in cells]
    )
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="AUROC", title="Exchanged captions found (dashed: chance)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def ablation(ablation: pd.DataFrame) -> Figure:
    """Relative error of the predicted change of the parameters: parts by what is removed, and the
    rank of the projection.
    """
    delta = ablation["delta_ratio"].iloc[0]
    rows = ablation[(ablation["delta_ratio"] == delta) & (ablation["kind"] != "scores")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9))
    whole = rows[rows["curvature"] == HESSIAN]
    for variant, colour in VARIANTS.items():
        own = whole[whole["variant"] == variant]
        errors = (
            own.groupby(["removed_share", "seed"])["parameter_error"]
            .mean()
            .groupby("removed_share")
            .mean()
        )
        left.plot(100 * errors.index, errors, marker="o", color=PALETTE[colour], label=variant)
    left.set(
        xscale="log",
        xlabel="removed, %",
        ylabel="relative error",
        title="Parts, against retraining",
    )
    pairs = rows[(rows["variant"] == "exact") & (rows["kind"] == "pair")]
    for label, colour in zip(LOGRA.values(), ("blue", "sky"), strict=True):
        projected = (
            pairs[pairs["curvature"].str.startswith(label)]
            .groupby("dimension")["parameter_error"]
            .mean()
        )
        right.plot(projected.index, projected, marker="o", color=PALETTE[colour], label=label)
    for name, colour in (
        (HESSIAN, "black"),
        (GAUSS_NEWTON, "green"),
        (IDENTITY, "orange"),
    ):
        error = pairs.loc[pairs["curvature"] == name, "parameter_error"].mean()
        if error <= 3:
            right.axhline(error, color=PALETTE[colour], linestyle="--", linewidth=1.4, label=name)
    right.set(
        xlabel="dimensions of the projection",
        ylabel="relative error",
        title="Curvature, single pairs",
    )
    left.set_ylim(0, None)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9
    )
    right.legend(fontsize=8.5)
    return figure


def gallery(trace: pd.DataFrame) -> Figure:
    """Table 3: wrongly captioned pictures and the training pairs that three rankings trace
    them to.
    """
    pictures = read_array(trace, "gallery")
    shown = trace[trace["shown"]]
    queries, rankings, columns = pictures.shape[:3]
    names = GALLERY[:rankings]
    figure, grid = plt.subplots(
        queries * rankings, columns, figsize=(6.4, 0.82 * queries * rankings), squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (_, rows) in enumerate(shown.groupby("query", sort=False)):
        first = rows.iloc[0]
        for line, name in enumerate(names):
            top = number * rankings + line
            for column in range(columns):
                if column > 0 or line == 0:
                    grid[top, column].imshow(pictures[number, line, column])
            grid[top, 1].text(
                -0.15,
                0.5,
                name,
                transform=grid[top, 1].transAxes,
                ha="right",
                va="center",
                fontsize=6.5,
            )
        grid[number * rankings, 0].set_title(
            f"{first['caption'][:42]}\ntaken for: {first['got_caption'][:42]}",
            fontsize=7,
            loc="left",
        )
    return figure
