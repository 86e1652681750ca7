"""ZO2's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.zo2.labels import CURVES, LANE_SHADES, LANES, MEMORY
from projects.zo2.tables import cost_of_offloading
from shared.figures import PALETTE


def memory_law(memory: pd.DataFrame) -> Figure:
    """Peak bytes against depth; ZO2 is flat."""
    figure, axes = plt.subplots()
    shown = memory[memory["peak_bytes"].notna()]
    counter = "nvml" if (shown["counter"] == "nvml").any() else shown["counter"].iloc[0]
    shown = shown[shown["counter"] == counter]
    for method, rows in shown.groupby("method", sort=False):
        rows = rows.sort_values("layers")
        axes.plot(
            rows["layers"],
            rows["peak_bytes"] / 1e9,
            marker="o",
            label=MEMORY[str(method)].label,
            color=PALETTE[MEMORY[str(method)].colour],
        )
    axes.set(
        yscale="log",
        xscale="log",
        xlabel="blocks",
        ylabel="peak device memory in GB",
        title="Peak device memory against depth",
    )
    depths = sorted(shown["layers"].unique())
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    ticks = [
        t
        for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        if shown["peak_bytes"].min() / 1.5e9 <= t <= shown["peak_bytes"].max() / 0.7e9
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def offloading_cost(sensitivity: pd.DataFrame) -> Figure:
    """Step time from a cold disk over resident step time, against tokens per step, with the
    predicted limit.
    """
    found = cost_of_offloading(sensitivity)
    figure, axes = plt.subplots()
    spread = [
        found["overlap_ratio"] - found["overlap_low_ratio"],
        found["overlap_high_ratio"] - found["overlap_ratio"],
    ]
    axes.plot(
        found["tokens"],
        found["sync_ratio"],
        marker="s",
        color=PALETTE["orange"],
        label="without overlap",
    )
    axes.errorbar(
        found["tokens"],
        found["overlap_ratio"],
        spread,
        marker="o",
        capsize=3,
        color=PALETTE["blue"],
        label="with overlap",
    )
    axes.plot(
        found["tokens"],
        found["predicted_ratio"],
        linestyle="--",
        color=PALETTE["black"],
        linewidth=1.3,
        label="predicted with overlap",
    )
    axes.axhline(1.0, color="#999999", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(found["tokens"]), [str(t) for t in found["tokens"]])
    axes.set(
        xlabel="tokens per step",
        ylabel="step time over resident",
        title="Offloading to a cold disk",
    )
    axes.legend()
    return figure


def lanes(schedule: pd.DataFrame) -> Figure:
    """What the lanes do during the last step, with and without overlap."""
    variants = list(dict.fromkeys(schedule["variant"]))
    figure, all_axes = plt.subplots(len(variants), 1, sharex=True, figsize=(6.0, 3.9))
    # a bar that has room for a number
    readable = 0.03 * (schedule["end_seconds"].max() - schedule["start_seconds"].min())
    for axes, variant in zip(all_axes, variants, strict=True):
        for span in schedule[schedule["variant"] == variant].itertuples():
            row = LANES.index(span.lane)
            start, end = span.start_seconds, span.end_seconds
            axes.barh(
                row,
                end - start,
                left=start,
                height=0.75,
                color=PALETTE[LANE_SHADES[span.block % 2]],
                edgecolor="white",
                linewidth=0.5,
            )
            if end - start > readable:
                axes.text(
                    (start + end) / 2,
                    row,
                    str(span.block),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white",
                )
        axes.set_yticks(range(len(LANES)), LANES)
        axes.invert_yaxis()
        axes.set_title(variant)
        axes.grid(axis="y", visible=False)
    all_axes[-1].set_xlabel("seconds since block 0 began to compute; numbers are blocks")
    return figure


def loss_curves(accuracy: pd.DataFrame) -> Figure:
    """Training losses; MeZO and ZO2 lie on one another."""
    steps = accuracy[(accuracy["kind"] == "step") & (accuracy["seed"] == accuracy["seed"].iloc[0])]
    figure, axes = plt.subplots()
    for method, (colour, look) in CURVES.items():
        rows = steps[steps["method"] == method].sort_values("step")
        axes.plot(rows["step"], rows["train_loss"], label=method, color=PALETTE[colour], **look)
    axes.set(
        xlabel="step",
        ylabel="training loss of the batch",
        title="Training loss with the same batches",
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure
