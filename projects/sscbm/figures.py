"""SSCBM's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from projects.sscbm.labels import (
    CBM_FULL,
    CEM_FULL,
    COLOURS,
    MAP_ARRAYS,
    NO_PSEUDO,
    RANDOM_ORDER,
    RIGHT,
    SETS,
    SSCBM,
    UNCERTAIN_ORDER,
    WRONG,
)
from projects.sscbm.tables import with_main
from shared.figures import PALETTE
from shared.rows import read_array
from shared.statistics import mean_interval
from shared.tables import paper_numbers


def curve(ratios: pd.DataFrame, main: pd.DataFrame) -> Figure:
    """Figure 1: accuracy against the share of annotated images, on the set with all shares, of CEM
    trained on these images alone (the paper's curve, for CUB, beside it) and of the others.
    """
    rows = with_main(ratios, main)
    name = ratios.groupby("dataset", sort=False)["ratio_share"].nunique().idxmax()
    rows = rows[rows["dataset"] == name]
    paper = paper_numbers("sscbm", "curve")
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.1))
    for axes, column, title in zip(
        panels, ("task_accuracy", "concept_accuracy"), ("classes", "concepts"), strict=True
    ):
        for method, one in rows.groupby("method", sort=False):
            means = one.groupby("ratio_share")[column].apply(mean_interval)
            at = 100 * means.index.to_numpy()
            value, low, high = (
                100 * np.array([getattr(mean, part) for mean in means])
                for part in ("value", "low", "high")
            )
            colour = PALETTE[COLOURS[str(method)]]
            axes.plot(at, value, marker="o", color=colour, label=str(method))
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(
            100 * paper["ratio_share"],
            100 * paper[column],
            linestyle=":",
            color=PALETTE["black"],
            label="paper: CUB, labelled images only",
        )
        axes.set_xscale("log")
        axes.set_xticks([1, 5, 10, 20, 40, 100], ["1", "5", "10", "20", "40", "100"])
        axes.minorticks_off()
        axes.set(
            xlabel="annotated, %", ylabel="accuracy, %", title=f"{SETS[str(name)][:13]}: {title}"
        )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9.5
    )
    return figure


def interventions(interventions: pd.DataFrame) -> Figure:
    """Task accuracy as a right and a wrong expert tell more groups of concepts."""
    names = list(interventions["dataset"].unique())
    figure, panels = plt.subplots(1, len(names), figsize=(4.4 * len(names), 4.3), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        own = interventions[interventions["dataset"] == name]
        for method in (SSCBM, NO_PSEUDO, CEM_FULL, CBM_FULL):
            for expert, order, style in (
                (RIGHT, RANDOM_ORDER, "-"),
                (RIGHT, UNCERTAIN_ORDER, ":"),
                (WRONG, RANDOM_ORDER, "--"),
            ):
                one = own[
                    (own["method"] == method) & (own["expert"] == expert) & (own["order"] == order)
                ]
                means = one.groupby("told_share")["task_accuracy"].mean()
                shown = method if (expert, order) == (RIGHT, RANDOM_ORDER) else None
                axes.plot(
                    100 * means.index,
                    100 * means,
                    linestyle=style,
                    color=PALETTE[COLOURS[method]],
                    label=shown,
                )
        axes.set(xlabel="groups told, %", ylabel="classes right, %", title=SETS[str(name)])
    handles, texts = panels[0][0].get_legend_handles_labels()
    for style, text in (
        ("-", "right, random order"),
        (":", "right, most uncertain first"),
        ("--", "wrong, random order"),
    ):
        handles.append(plt.Line2D([], [], linestyle=style, color="#666666"))
        texts.append(text)
    figure.legend(handles, texts, loc="outside lower center", ncols=2, fontsize=9.5)
    return figure


def maps(saliency: pd.DataFrame) -> Figure:
    """Heat maps of the digits that are there, over some test scenes of the first seed."""
    pictures, places = read_array(saliency, "pictures"), read_array(saliency, "places")
    variants = {name: read_array(saliency, array) for name, array in MAP_ARRAYS.items()}
    count = len(pictures)
    figure, panels = plt.subplots(
        1 + 2 * len(variants), count, figsize=(1.45 * count, 1.6 * (1 + 2 * len(variants)))
    )
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    edge = pictures.shape[-1]
    for column in range(count):
        digits = np.flatnonzero(places[column] >= 0)[:2]
        panels[0, column].imshow(pictures[column, 0], cmap="gray")
        for number, (variant, maps_of) in enumerate(variants.items()):
            for place, digit in enumerate(digits):
                axes = panels[1 + 2 * number + place, column]
                axes.imshow(pictures[column, 0], cmap="gray", extent=(0, edge, edge, 0))
                heat = maps_of[column, digit]
                axes.imshow(
                    heat,
                    cmap="inferno",
                    alpha=0.6,
                    extent=(0, edge, edge, 0),
                    interpolation="bicubic",
                )
                axes.set_title(str(digit), fontsize=10, pad=2)
                if column == 0:
                    axes.set_ylabel(
                        variant.replace("SSCBM", "").strip(", ") or "SSCBM", fontsize=10
                    )
    figure.suptitle("Heat maps of the two digits that are there", fontsize=12.5, x=0.02, ha="left")
    return figure
