"""DistZO2's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.distzo2.labels import (
    BATCH_IN_ALL,
    DDP,
    KINDS,
    LANES,
    LARGE,
    PLANS,
    SLICED_COLOUR,
    WHOLE_COLOUR,
)
from projects.distzo2.tables import errors, links
from shared.figures import PALETTE
from shared.tables import paper_numbers


def link(link: pd.DataFrame) -> Figure:
    """The time of a step against the rate of an emulated link."""
    found = links(link)
    found = found[found["link_gigabytes_per_second"] > 0]
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    rates = 1000 * found["link_gigabytes_per_second"]
    axes.plot(
        rates,
        1000 * found["whole_seconds"],
        marker="o",
        label="whole blocks",
        color=PALETTE[WHOLE_COLOUR],
    )
    axes.plot(
        rates,
        1000 * found["predicted_seconds"],
        linestyle=":",
        label="whole blocks, predicted",
        color=PALETTE[WHOLE_COLOUR],
    )
    axes.plot(
        rates,
        1000 * found["sliced_seconds"],
        marker="o",
        label="slices",
        color=PALETTE[SLICED_COLOUR],
    )
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(
        xlabel="emulated link to the host, MB/s for two ranks", ylabel="step, ms", ylim=(0, None)
    )
    axes.legend()
    return figure


def lanes(lanes: pd.DataFrame) -> Figure:
    """One step on each rank: what each lane does when."""
    modes = list(dict.fromkeys(lanes["mode"]))
    figure, rows = plt.subplots(
        len(modes), 1, figsize=(8.4, 1.1 + 1.9 * len(modes)), sharex=True, squeeze=False
    )
    for axes, mode in zip(rows[:, 0], modes, strict=True):
        places = []
        for rank in sorted(lanes["rank"].unique()):
            for lane in LANES:
                own = lanes[
                    (lanes["mode"] == mode) & (lanes["rank"] == rank) & (lanes["lane"] == lane)
                ]
                if own.empty:
                    continue
                places.append(f"rank {rank}, {lane}")
                for _, span in own.iterrows():
                    begin, width = (
                        1000 * span["begin_seconds"],
                        1000 * (span["end_seconds"] - span["begin_seconds"]),
                    )
                    axes.barh(
                        len(places) - 1,
                        width,
                        left=begin,
                        height=0.7,
                        color=PALETTE[LANES[lane]],
                        edgecolor="white",
                        linewidth=0.4,
                    )
        axes.set_yticks(range(len(places)), places)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(mode)
    rows[-1, 0].set_xlabel("ms from the start of the step (the link to the host is emulated)")
    return figure


def accuracy(accuracy: pd.DataFrame) -> Figure:
    """Training losses by mode, one over the other, the first ones widest."""
    steps = accuracy[(accuracy["kind"] == "step") & (accuracy["seed"] == accuracy["seed"].iloc[0])]
    figure, axes = plt.subplots()
    modes = list(dict.fromkeys(steps["mode"]))
    for place, mode in enumerate(modes):
        own = steps[steps["mode"] == mode].sort_values("step")
        axes.plot(
            own["step"],
            own["train_loss"],
            label=mode,
            linewidth=2 * (len(modes) - place),
            solid_capstyle="butt",
        )
    axes.set(xlabel="step", ylabel="loss of the step", title="One process and ranks: one curve")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def largebatch(largebatch: pd.DataFrame) -> Figure:
    """The loss of every step by size of the global batch."""
    figure, axes = plt.subplots()
    for size, rows in largebatch[largebatch["kind"] == "step"].groupby("batch_size"):
        own = rows.sort_values("step")
        axes.plot(own["step"], own["train_loss"], label=f"global batch {size}", linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss of the step")
    for line in axes.legend().get_lines():
        line.set_linewidth(2.2)
    return figure


def plan(plan: pd.DataFrame, cost: pd.DataFrame) -> Figure:
    """Left: predicted speed-ups on OPT-175B against the number of GPUs. Right: the model against
    steps measured here.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0))
    first = plan["gpu"].iloc[0]
    of = plan[
        (plan["model"] == LARGE)
        & (plan["gpu"] == first)
        & (plan["mode"] == DDP)
        & (plan["same_batch"] == BATCH_IN_ALL)
    ]
    # some lie on others: the first ones are widest
    for place, ((links_to, transfer), (said, colour)) in enumerate(PLANS.items()):
        own = of[(of["links"] == links_to) & (of["transfer"] == transfer)].sort_values("gpus")
        speeds = [1.0, *own["speedup_ratio"]]
        widths = {"linewidth": 8 - 2 * place, "markersize": 9 - 2 * place}
        left.plot(
            [1, *own["gpus"]], speeds, marker="o", color=PALETTE[colour], label=said, **widths
        )
    counts = [1, *sorted(of["gpus"].unique())]
    paper = float(
        paper_numbers("distzo2", "headline")
        .set_index("quantity")
        .loc["throughput over ZO2", "value"]
    )
    left.axhline(
        paper,
        color=PALETTE["black"],
        linewidth=1,
        linestyle=":",
        label=f"the paper's {paper:g} times",
    )
    left.set_xticks(counts)
    left.set(
        xlabel=f"GPUs ({first}), DDP, 8 sequences in all",
        ylabel="speed-up over ZO2 on one",
        title="OPT-175B, predicted",
        ylim=(0, None),
    )
    left.legend(fontsize=8.5)

    found = errors(cost)
    for kind, (marker, colour) in KINDS.items():
        own = found[found["kind"] == kind]
        both = (
            own["batch_tokens"] / own[f"{which}_seconds"] for which in ("measured", "predicted")
        )
        right.loglog(
            *both, marker, color=PALETTE[colour], label=kind, markersize=5, linestyle="none"
        )
    ends = [
        0.9 * min(right.get_xlim()[0], right.get_ylim()[0]),
        1.1 * max(right.get_xlim()[1], right.get_ylim()[1]),
    ]
    right.plot(ends, ends, color=PALETTE["black"], linewidth=1)
    right.set(
        xlim=ends,
        ylim=ends,
        xlabel="measured here, tokens/s",
        ylabel="predicted, tokens/s",
        title="The model on this machine",
    )
    ticks = [
        tick
        for tick in (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
        if ends[0] < tick < ends[1]
    ]
    for axis in (right.set_xticks, right.set_yticks):
        axis(ticks, [f"{tick:,}" for tick in ticks])
    right.minorticks_off()
    right.set_aspect("equal")
    right.legend()
    return figure
