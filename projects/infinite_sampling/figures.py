"""Infinite Sampling's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.infinite_sampling import labels
from projects.infinite_sampling.tables import speeds
from shared.figures import PALETTE

GANTT = (labels.MICRO, labels.FIFO, labels.FRAMEWORK)


def evolution(schedule: pd.DataFrame) -> Figure:
    """Decoding steps from micro groups to the full framework; the dashed line is the lower
    bound.
    """
    found = speeds(schedule).set_index("schedule")
    names = [name for name in labels.EVOLUTION_COLOURS if name in found.index]
    figure, axes = plt.subplots(figsize=(7.0, 3.2))
    steps = found.loc[names, "mean_steps"]
    colours = [PALETTE[labels.EVOLUTION_COLOURS[name]] for name in names]
    bars = axes.barh(names[::-1], steps[::-1], color=colours[::-1])
    base = steps.iloc[0]
    axes.bar_label(
        bars,
        [
            f"{value:.0f} ({value / base - 1:+.0%})" if value != base else f"{value:.0f}"
            for value in steps[::-1]
        ],
        padding=4,
    )
    bound = schedule[schedule["kind"] == "rollout"].groupby("prompt")["lower_bound"].first().mean()
    axes.axvline(bound, color=PALETTE["black"], linestyle="--", linewidth=1.2)
    axes.set(
        xlabel="decoding steps, mean (dashed: lower bound)",
        xlim=(0, 1.25 * base),
        title="From micro groups to the framework",
    )
    axes.grid(axis="y", visible=False)
    return figure


def occupancy(schedule: pd.DataFrame) -> Figure:
    """Slots over time for one group; a colour is a completion, white is idle."""
    spans = schedule[schedule["kind"] == "span"]
    names = [name for name in GANTT if name in set(spans["schedule"])]
    figure, found = plt.subplots(
        len(names), 1, figsize=(7.0, 1.5 * len(names) + 0.8), sharex=True, squeeze=False
    )
    colours = plt.get_cmap("tab20").colors
    for axes, name in zip(found[:, 0], names, strict=True):
        rows = spans[spans["schedule"] == name]
        for slot, completion, first, last in (
            rows[["slot", "completion", "first", "last"]].astype(int).to_numpy()
        ):
            axes.barh(
                slot,
                last - first,
                left=first,
                height=0.9,
                color=colours[completion % 20],
                edgecolor="white",
                linewidth=0.6,
            )
        axes.set(ylabel="slot", title=f"{name}: {int(rows['last'].max())} steps")
        axes.grid(visible=False)
        axes.invert_yaxis()
    found[-1, 0].set_xlabel("decoding step")
    return figure


def memory(memory: pd.DataFrame) -> Figure:
    """Peak beyond the weights against the size of the group, with a fixed number of slots."""
    rows = memory[memory["kind"] == "groups"]
    figure, axes = plt.subplots()
    for mode, colour in labels.MEMORY_COLOURS.items():
        own = rows[rows["mode"] == mode]
        axes.plot(
            own["group"],
            own["peak_bytes"] / 1e6,
            marker="o",
            color=PALETTE[colour],
            linestyle="--" if mode == labels.FULL_FRAMEWORK else "-",
            label=mode,
        )
    ticks = sorted(rows["group"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    slots = int(rows.loc[rows["mode"] == labels.MICRO, "slots"].max())
    axes.set(
        xlabel="completions in a group",
        ylabel="peak beyond weights, MB",
        ylim=(0, None),
        title=f"Memory with {slots} slots",
    )
    axes.legend()
    return figure


def prediction(prediction: pd.DataFrame) -> Figure:
    """Order within groups, and error of the total length, against the number of tokens seen."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.7))
    colours = labels.PREDICTOR_COLOURS
    ticks = sorted(prediction["prefix"].unique())
    for name, rows in prediction.groupby("predictor", sort=False):
        places = [ticks.index(k) for k in rows["prefix"]]
        left.plot(
            places, rows["group_tau_ratio"], marker="o", color=PALETTE[colours[name]], label=name
        )
        left.plot(
            places,
            rows["pooled_tau_ratio"],
            linestyle=":",
            linewidth=1.4,
            color=PALETTE[colours[name]],
        )
        right.plot(places, rows["total_error_tokens"], marker="o", color=PALETTE[colours[name]])
    for axes in (left, right):
        axes.set_xticks(range(len(ticks)), [str(k) for k in ticks])
        axes.set_xlabel("tokens seen, k")
    left.set(ylabel="Kendall's tau", title="Order (dotted: pooled)", ylim=(-0.05, 1.05))
    right.set(ylabel="tokens", title="Error of the total length", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def rewards(training: pd.DataFrame) -> Figure:
    """Reward per step, and how long completions are: of this engine's rollouts, which lie on one
    another, and of TRL's own (float32).
    """
    steps = training[training["kind"] == "step"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.7))
    lines = {  # those of this engine's rollouts lie on one another, the widest below
        labels.FULL: {"color": "#bbbbbb", "linewidth": 7},
        labels.MICRO: {"linewidth": 3.5},
        labels.TRAINED_FRAMEWORK: {"linewidth": 1.2},
        labels.TRL_OURS: {"linestyle": "", "marker": ".", "markersize": 4},
        labels.TRL: {"linestyle": "--", "linewidth": 1.2},
    }
    for mode, line in lines.items():
        colour = labels.TRAINER_COLOURS.get(mode)
        look = line if colour is None else {"color": PALETTE[colour], **line}
        rows = steps[steps["mode"] == mode]
        rows = rows[rows["dtype"] == rows["dtype"].iloc[0]] if len(rows) else rows
        left.plot(rows["step"], rows["reward_score"], label=mode, **look)
        right.plot(rows["step"], rows["length_tokens"], **look)
    left.set(xlabel="step", ylabel="mean reward", title="Reward")
    right.set(xlabel="step", ylabel="tokens", title="Mean length", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=5)
    return figure
