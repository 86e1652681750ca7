"""SAM-IF's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.sam_if import labels
from shared.figures import PALETTE
from shared.rows import read_array
from shared.statistics import mean_interval
from shared.vision.classes import CLASSES

LOOKS, ABLATION_LOOKS = (
    {method: {**look, "color": PALETTE[str(look["color"])]} for method, look in looks.items()}
    for looks in (labels.LOOKS, labels.ABLATION_LOOKS)
)


def editing(editing: pd.DataFrame) -> Figure:
    """Test accuracy of the edited model less that of the retrained one, by share removed."""
    models = list(dict.fromkeys(editing["model"]))
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.4 * len(models), 3.9), sharey=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        rows = editing[(editing["model"] == model) & (editing["removed_share"] > 0)]
        wide = rows.pivot_table(
            index=["dataset", "removed_share"], columns="method", values="test_accuracy", sort=False
        )
        above = {
            labels.SAM_IF: {"zorder": 6, "linewidth": 1.8},
            labels.IF: {"zorder": 7, "linestyle": ":", "linewidth": 1.8},
            labels.NO_EDIT: {"color": "#999999", "linestyle": "--"},
        }  # or SAM-HIF hides them
        for method in (
            labels.SAM_HIF,
            labels.SAM_GIF,
            labels.SAM_IF,
            labels.IF,
            labels.TRACIN,
            labels.NO_EDIT,
        ):
            gap = 100 * (wide[method] - wide[labels.RETRAIN]).groupby("removed_share").mean()
            axes.plot(
                100 * gap.index,
                gap,
                marker="o",
                markersize=4,
                label=method if model == models[0] else None,
                **{**LOOKS.get(method, {}), **above.get(method, {})},
            )
        axes.axhline(0, color=PALETTE["black"], linewidth=1)
        axes.set(title=model.capitalize(), xlabel="removed, % of the samples")
    panels[0][0].set_ylabel("test accuracy to Retrain, points")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def removal(removal: pd.DataFrame) -> Figure:
    """Test accuracy after the most harmful samples are removed, by score; mean over seeds."""
    curves = removal[removal["kind"] == "curve"]
    names = list(dict.fromkeys(curves["dataset"]))
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.6 * len(names) + 0.4, 4.4), squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        rows = curves[curves["dataset"] == name]
        before = 100 * rows.loc[rows["method"] == labels.NONE_REMOVED, "test_accuracy"].mean()
        clean = 100 * rows.loc[rows["method"] == labels.ALL_WRONG_REMOVED, "test_accuracy"].mean()
        for method, look in LOOKS.items():
            line = (
                100
                * rows[rows["method"] == method].groupby("removed_share")["test_accuracy"].mean()
            )
            axes.plot(
                [0, *(100 * line.index)],
                [before, *line],
                label=method if name == names[0] else None,
                **look,
            )
        axes.axhline(
            clean,
            color="#999999",
            linewidth=1.2,
            label="all wrong labels removed" if name == names[0] else None,
        )
        axes.set(title=name, xlabel="removed, %")
    panels[0][0].set_ylabel("test accuracy, %")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def agreement(agreement: pd.DataFrame, trajectory: pd.DataFrame) -> Figure:
    """Pearson's correlation with the truth, of softmax regression at the fixed point and of the
    network after a few epochs.
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.6))
    titles = ("At the fixed point", "After a few epochs")
    for axes, frame, title in zip(panels, (agreement, trajectory), titles, strict=True):
        found = [
            (method, *mean_interval(rows["pearson_correlation"]))
            for method, rows in frame.dropna(subset="pearson_correlation").groupby(
                "method", sort=False
            )
        ]
        found.sort(key=lambda one: one[1])
        for place, (method, mean, low, high) in enumerate(found):
            colour = (
                PALETTE["blue"]
                if "HIF" in method
                else PALETTE["green"]
                if "GIF" in method
                else "#999999"
            )
            axes.barh(place, mean, color=colour, height=0.7)
            if low == low:
                axes.plot(
                    [low, min(high, 1)], [place, place], color=PALETTE["black"], linewidth=1.4
                )
        axes.set_yticks(range(len(found)), [one[0] for one in found])
        axes.set(
            title=title,
            xlabel="Pearson, leaving one out",
            xlim=(min(0, *(one[1] for one in found)), 1.02),
        )
        axes.grid(axis="y", visible=False)
    return figure


def radius(radius: pd.DataFrame) -> Figure:
    """Error of the parameters' change against retraining, by the radius; means over seeds with
    their range.
    """
    figure, axes = plt.subplots()
    names = {
        method: {**LOOKS, **ABLATION_LOOKS}[method] for method in dict.fromkeys(radius["method"])
    }
    for method, look in names.items():
        rows = radius[radius["method"] == method].groupby("rho_scale")["parameter_error"]
        axes.plot(rows.mean().index, rows.mean(), marker="o", markersize=4, label=method, **look)
        axes.fill_between(
            rows.mean().index, rows.min(), rows.max(), color=look["color"], alpha=0.15, linewidth=0
        )
    axes.set(
        xlabel="rho",
        ylabel="error of the parameters' change",
        title="What the radius does to the estimates",
        ylim=(0, None),
    )
    axes.legend()
    return figure


def gallery(gallery: pd.DataFrame) -> Figure:
    """A line per query: the test image, its most helpful and its most harmful training images."""
    queries = [
        (name, query, rows)
        for (name, query), rows in gallery.groupby(["dataset", "query"], sort=False)
    ]
    top = int(gallery["place"].max())
    figure, panels = plt.subplots(
        len(queries), 2 * top + 1, figsize=(1.15 * (2 * top + 1), 1.4 * len(queries)), squeeze=False
    )
    place_of: dict[str, int] = {}
    for line, (name, _, rows) in zip(panels, queries, strict=True):
        number = place_of.setdefault(name, 0)
        place_of[name] += 1
        pictures = read_array(gallery, name.replace("-", "_"))[number]
        named = (
            CLASSES[name] if name in ("fashion-mnist", "cifar10") else [str(i) for i in range(10)]
        )
        first = rows.iloc[0]
        right = first["predicted"] == first["query_label"]
        texts = [
            named[first["query_label"]]
            if right
            else f"{named[first['query_label']]}\nnot {named[first['predicted']]}"
        ]
        texts += [named[one] for one in rows["label"]]
        for axes, picture, text, place in zip(
            line, pictures, texts, range(len(texts)), strict=True
        ):
            axes.imshow(
                picture, cmap=None if picture.ndim == 3 else "gray_r", interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            colour = (
                PALETTE["black"]
                if place == 0
                else PALETTE["blue"]
                if place <= top
                else PALETTE["orange"]
            )
            for spine in axes.spines.values():
                spine.set(visible=True, color=colour, linewidth=2)
            axes.set_xlabel(text, fontsize=7.5, color=colour, labelpad=2)
    for place, title in ((0, "query"), (1, "most helpful"), (1 + top, "most harmful")):
        panels[0][place].set_title(title, fontsize=10)
    return figure
