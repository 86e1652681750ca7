"""DistZO2's figures: rows in, matplotlib `Figure` out."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from projects.distzo2.tables import links
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
