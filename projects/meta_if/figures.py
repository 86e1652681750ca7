"""meta-IF's figures: rows in, matplotlib `Figure` out."""

from itertools import product
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from projects.meta_if import labels
from projects.meta_if.tables import mean_curve
from shared.figures import PALETTE
from shared.statistics import mean_interval

LOOKS = {
    method: {**look, "color": PALETTE.get(str(look["color"]), look["color"])}
    for method, look in labels.LOOKS.items()
}


def harmful(harmful: pd.DataFrame) -> Figure:
    """Share of the spoiled tasks found against the share inspected, a row of panels for each way of
    spoiling and a panel for each share that is spoiled.
    """
    shares = sorted(harmful["spoiled_share"].unique())
    settings = list(dict.fromkeys(harmful["setting"]))
    figure, panels = plt.subplots(
        len(settings),
        len(shares),
        figsize=(3.2 * len(shares) + 0.6, 2.9 * len(settings) + 1.1),
        sharey=True,
        squeeze=False,
    )
    for axes, (setting, share) in zip(panels.flat, product(settings, shares), strict=True):
        axes.plot([0, 100], [0, 100], color="#cccccc", linewidth=1, zorder=0)
        for method, look in LOOKS.items():
            curve = mean_curve(harmful, setting, share, method)
            if len(curve):
                axes.plot(
                    100 * curve.index,
                    100 * curve,
                    label=method if axes is panels[0][0] else None,
                    **look,
                )
        axes.set(xlim=(0, 100), ylim=(0, 102))
    for axes, share in zip(panels[0], shares, strict=True):
        axes.set_title(f"{share:.0%} spoiled")
    for axes in panels[-1]:
        axes.set_xlabel("tasks inspected, %")
    for axes, setting in zip(panels[:, 0], settings, strict=True):
        axes.set_ylabel(f"{fill(setting, 20)}\n\nfound, %")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def loo(loo: pd.DataFrame) -> Figure:
    """Correlation with leaving a task out, by method: each seed a point, the mean with its
    interval.
    """
    methods = list(dict.fromkeys(loo["method"]))[::-1]
    figure, axes = plt.subplots(figsize=(6.4, 0.36 * len(methods) + 1.3))
    for place, method in enumerate(methods):
        values = loo.loc[loo["method"] == method, "loss_correlation"]
        mean = mean_interval(values)
        colour = LOOKS.get(method, {}).get("color", PALETTE["black"])
        axes.plot(values, np.full(len(values), place), "o", color=colour, alpha=0.35, markersize=5)
        if not np.isnan(mean.low):
            axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=2)
        axes.plot([mean.value], [place], "D", color=colour, markersize=7)
    axes.set_yticks(range(len(methods)), methods)
    axes.set(
        xlabel="correlation with leaving the task out",
        xlim=(-1.02, 1.02),
        title="Agreement with retraining",
    )
    axes.axvline(0, color="#999999", linewidth=1)
    return figure


def depth(depth: pd.DataFrame) -> Figure:
    """Error of the series against its depth, for the exact matrix and with Gamma; dashed, what each
    matrix gives when solved. Beside it the depth that is needed against the smallest eigenvalue.
    """
    figure, (axes, needed) = plt.subplots(1, 2, figsize=(9.6, 4.6))
    conditioning = depth[depth["kind"] == "conditioning"]
    for method in (labels.TASK_IF, labels.GAMMA):
        rows = conditioning[conditioning["method"] == method].dropna(subset=["depth_needed"])
        needed.plot(
            rows["smallest_eigenvalue_scale"],
            rows["depth_needed"].clip(lower=1),
            "o",
            color=LOOKS[method]["color"],
        )
    needed.set(
        xscale="log",
        yscale="log",
        xlabel="smallest eigenvalue",
        ylabel="depth needed",
        title="Depth and conditioning",
    )
    depth = depth[depth["kind"] == "error"]
    series = depth[depth["solver"] == labels.NEUMANN]
    solved = depth[depth["solver"] == labels.DENSE].set_index("method")["relative_error"]
    for method in (labels.TASK_IF, labels.GAMMA):
        rows = series[series["method"] == method].sort_values("depth")
        axes.plot(
            rows["depth"],
            rows["relative_error"],
            marker="o",
            color=LOOKS[method]["color"],
            label=f"{method}, series",
        )
    for method in (labels.GAMMA, labels.GAUSS_NEWTON, labels.DIRECT_IF, labels.FOUR_TERMS):
        if method in solved:
            colour = LOOKS.get(method, {"color": PALETTE["purple"]})["color"]
            axes.axhline(
                solved[method],
                color=colour,
                linestyle="--",
                linewidth=1.3,
                label=f"{method}, solved",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="depth of the series",
        ylabel="relative error",
        title="Error of the predicted change",
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure
