"""DistZO2's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.distzo2.tables import LANES, links
from shared.figures import PALETTE


def link(link: pd.DataFrame) -> Figure:
    """The time of a step against the rate of an emulated link."""
    found = links(link)
    found = found[found["link_gigabytes_per_second"] > 0]
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    rates = 1000 * found["link_gigabytes_per_second"]
    axes.plot(rates, 1000 * found["whole_seconds"], marker="o", label="whole blocks", color=PALETTE["orange"])
    axes.plot(rates, 1000 * found["predicted_seconds"], linestyle=":", label="whole blocks, predicted", color=PALETTE["orange"])
    axes.plot(rates, 1000 * found["sliced_seconds"], marker="o", label="slices", color=PALETTE["blue"])
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="emulated link to the host, MB/s for two ranks", ylabel="step, ms", ylim=(0, None))
    axes.legend()
    return figure


def lanes(lanes: pd.DataFrame) -> Figure:
    """One step on each rank: what each lane does when."""
    modes = list(dict.fromkeys(lanes["mode"]))
    figure, rows = plt.subplots(len(modes), 1, figsize=(8.4, 1.1 + 1.9 * len(modes)), sharex=True, squeeze=False)
    colours = dict(zip(LANES, (PALETTE["orange"], PALETTE["purple"], PALETTE["blue"], PALETTE["green"]), strict=True))
    for axes, mode in zip(rows[:, 0], modes, strict=True):
        places = []
        for rank in sorted(lanes["rank"].unique()):
            for lane in LANES:
                own = lanes[(lanes["mode"] == mode) & (lanes["rank"] == rank) & (lanes["lane"] == lane)]
                if own.empty:
                    continue
                places.append(f"rank {rank}, {lane}")
                for _, span in own.iterrows():
                    begin, width = 1000 * span["begin_seconds"], 1000 * (span["end_seconds"] - span["begin_seconds"])
                    axes.barh(len(places) - 1, width, left=begin, height=0.7, color=colours[lane], edgecolor="white", linewidth=0.4)
        axes.set_yticks(range(len(places)), places)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(mode)
    rows[-1, 0].set_xlabel("ms from the start of the step (the link to the host is emulated)")
    return figure
