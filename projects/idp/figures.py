"""IDP's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from projects.idp.labels import COLOURS, DISPLAY, FINE_TUNING, IDP, RIDGE
from projects.idp.tables import ablation_lines, by_target, difference, style_means
from shared.figures import PALETTE
from shared.rows import read_array


def differences(main: pd.DataFrame) -> Figure:
    """What IDP adds to fine-tuning without proxies, and to the ridge head, on each target."""
    shots = sorted(main["shots"].unique())
    figure, panels = plt.subplots(
        1, len(shots), figsize=(8.4, 4.2), sharey=True, sharex=True, squeeze=False
    )
    for axes, count in zip(panels[0], shots, strict=True):
        targets = by_target(main, count)
        places = np.arange(len(targets))[::-1]
        for shift, second, name in (
            (0.16, FINE_TUNING, "less fine-tuning without proxies"),
            (-0.16, RIDGE, "less the ridge head, not adapted"),
        ):
            gaps = [difference(rows, IDP, second) for rows in targets.values()]
            middle = 100 * np.array([gap.value for gap in gaps])
            half = 100 * np.array([(gap.high - gap.low) / 2 for gap in gaps])
            axes.errorbar(
                middle,
                places + shift,
                xerr=half,
                fmt="o",
                color=PALETTE[COLOURS[second]],
                label=name,
                linewidth=1.6,
                markersize=5,
            )
        axes.axvline(0, color="#999999", linewidth=1)
        axes.set(xlabel="points of accuracy", title=f"IDP, {count}-shot")
        axes.set_yticks(places, [DISPLAY[target] for target in targets])
        axes.grid(axis="y", visible=False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def proxies(proxies: pd.DataFrame) -> Figure:
    """Content and style of proxies by domain, from the source to the farthest."""
    frame = style_means(proxies).droplevel(0)
    places = np.arange(len(frame))[::-1]
    names = [DISPLAY.get(str(name), str(name)) for name in frame.index]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2), sharey=True)
    for column, colour, name, marker in (
        ("error_ratio", "blue", "of |T|²", "o"),
        ("centred_ratio", "sky", "of the spread of T", "s"),
    ):
        left.plot(
            frame[column], places, marker, color=PALETTE[colour], label=name, linestyle="none"
        )
    left.set(xlabel="squared error of the proxies", title="Content lost", xlim=(0, None))
    for column, colour, name, marker in (
        ("moments_target_source_ratio", "black", "target - source", "o"),
        ("moments_proxy_source_ratio", "blue", "proxy - source", "^"),
        ("moments_proxy_target_ratio", "orange", "proxy - target", "s"),
    ):
        right.plot(
            frame[column], places, marker, color=PALETTE[colour], label=name, linestyle="none"
        )
    right.set(xlabel="distance of channel moments", title="Style", xlim=(0, None))
    left.set_yticks(places, names)
    handles = [axes.get_legend_handles_labels() for axes in (left, right)]
    figure.legend(
        [*handles[0][0], *handles[1][0]],
        [*handles[0][1], *handles[1][1]],
        loc="outside lower center",
        ncols=5,
        fontsize=9,
        columnspacing=1.2,
        handletextpad=0.3,
    )
    return figure


def mosaics(proxies: pd.DataFrame) -> Figure:
    """What a proxy is: a target's image; the patches of source drawings whose cells are nearest to
    its cells; and those nearest to its proxies.
    """
    gallery = read_array(proxies, "gallery")  # [targets, images, 3, size, size, 3]
    images = gallery.reshape(-1, *gallery.shape[2:])
    figure, grid = plt.subplots(
        3, len(images), figsize=(1.25 * len(images) + 1.3, 4.2), squeeze=False
    )
    names = (
        "target image",
        "source cells\nnearest to\nits cells",
        "source cells\nnearest to\nits proxies",
    )
    for line, name in enumerate(names):
        for column, image in enumerate(images):
            axes = grid[line, column]
            axes.imshow(image[line])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
        grid[line, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9.5)
    return figure


def ablation(ablation: pd.DataFrame) -> Figure:
    """Each setting less fine-tuning without proxies, on the same tasks."""
    lines = ablation_lines(ablation)
    lines = lines[~((lines["what"] == "losses") & (lines["value"] == "T"))]
    names = lines[["what", "value"]].drop_duplicates()
    places = np.arange(len(names))[::-1]
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(names) + 1.6))
    colours = ("blue", "orange", "green", "purple")
    targets = list(lines.groupby(["target", "shots"], sort=False))
    for number, ((target, shots), part) in enumerate(targets):
        gaps = part["over_fine_tuning"]
        axes.errorbar(
            [100 * gap.value for gap in gaps],
            places + 0.3 * (0.5 - (number + 0.5) / len(targets)) * 2,
            xerr=[50 * (gap.high - gap.low) for gap in gaps],
            fmt="o",
            color=PALETTE[colours[number]],
            label=f"{DISPLAY[str(target)]}, {shots}-shot",
            linewidth=1.6,
            markersize=4.5,
        )
    axes.axvline(0, color="#999999", linewidth=1)
    axes.set_yticks(places, [f"{what} {value}".strip() for what, value in names.to_numpy()])
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="points over fine-tuning with T alone", title="Ablation")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
