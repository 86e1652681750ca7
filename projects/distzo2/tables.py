"""DistZO2's tables: rows in, `Table` out."""

import numpy as np
import pandas as pd

from shared.meters import ratio
from shared.tables import Column, Table, paper_numbers

RANDOM = "Random weights, random tokens: bits, bytes and speed do not depend on them."
FIRST_ORDER = "first-order DDP"


def equality(equality: pd.DataFrame) -> Table:
    return Table(
        title="Ranks and one process",
        caption="How many of all ranks' losses and projected gradients differ in a bit from those of ZO2 in one process, which walks "
        "the same micro-batches in order, and whether all weights are equal to the last bit at the end.",
        frame=equality,
        columns={
            "mode": "mode",
            "ranks": "ranks",
            "transfer": "transfers",
            "steps": "steps",
            "replicas_equal": "ranks equal",
            "losses_differing": "losses that differ",
            "gradients_differing": "gradients that differ",
            "weights_equal": "weights as one process",
            "largest_gradient_error_ratio": Column("largest error of g", "{:.1e}"),
        },
        notes=[
            RANDOM,
            "Naive restore is the obvious scheme, in which each rank makes only its own perturbation; it is here to be seen drifting.",
        ],
    )


def per_rank(communication: pd.DataFrame) -> pd.DataFrame:
    """By mode and number of ranks: the most bytes of a rank, and those of the host link over the whole of the blocks."""
    found = communication.groupby(["mode", "ranks"], sort=False, as_index=False).agg(
        parameters=("parameters", "first"),
        micro_batches=("micro_batches", "first"),
        host_up_bytes=("host_up_bytes", "max"),
        all_up_bytes=("host_up_bytes", "sum"),
        host_down_bytes=("host_down_bytes", "max"),
        exchanged_bytes=("exchanged_bytes", "max"),
        scalar_bytes=("scalar_bytes", "max"),
    )
    replicated = found[~found["mode"].str.contains("sliced") & (found["mode"] != FIRST_ORDER)]
    whole = float(replicated["host_up_bytes"].max()) if len(replicated) else np.nan
    found["host_share"] = found["host_up_bytes"] / whole
    found["all_share"] = found["all_up_bytes"] / whole
    return found


def communication(communication: pd.DataFrame) -> Table:
    found = per_rank(communication)
    found.loc[found["mode"] == FIRST_ORDER, ["host_share", "all_share"]] = np.nan
    found["scalars"] = [f"{b:,.0f} B" for b in found["scalar_bytes"]]
    return Table(
        title="Bytes of a rank and step",
        caption="What the busiest rank moves over its link to the host, what it takes from other ranks' slices, and what it sends of "
        "losses; for first-order data parallelism the gradient that it gives to all-reduce.",
        frame=found,
        columns={
            "mode": "mode",
            "ranks": "ranks",
            "host_up_bytes": "host up",
            "host_down_bytes": "host down",
            "host_share": Column("of the blocks", "{:.1%}"),
            "exchanged_bytes": "exchanged",
            "micro_batches": "micro-batches a rank",
            "scalars": "sent (losses or gradient)",
        },
        notes=[RANDOM],
    )


def peaks(memory: pd.DataFrame) -> pd.DataFrame:
    """By mode and depth the most device bytes of any rank, and their ratio to ZO2's at that depth."""
    found = memory.groupby(["mode", "ranks", "layers"], sort=False, as_index=False)["device_peak_bytes"].max()
    alone = found[found["mode"] == "ZO2"].set_index("layers")["device_peak_bytes"]
    found["zo2_ratio"] = found["device_peak_bytes"] / found["layers"].map(alone)
    return found


def memory(memory: pd.DataFrame) -> Table:
    return Table(
        title="Device memory of a rank",
        caption="The most bytes that torch hands out on a rank during a step of the same global batch.",
        frame=peaks(memory),
        columns={
            "mode": "mode",
            "ranks": "ranks",
            "layers": "blocks",
            "device_peak_bytes": "peak of the fullest rank",
            "zo2_ratio": Column("of ZO2's", "{:.3f}"),
        },
        notes=[RANDOM],
    )


LANES = ("upload", "exchange", "compute", "offload")


def shares(lanes: pd.DataFrame) -> pd.DataFrame:
    """By mode and rank: each lane's part of the time that all of the rank's lanes work, and how much of the step it works."""
    lanes = lanes.assign(busy_seconds=lanes["end_seconds"] - lanes["begin_seconds"])
    busy = lanes.pivot_table(index=["mode", "rank"], columns="lane", values="busy_seconds", aggfunc="sum", sort=False).fillna(0.0)
    steps = lanes.groupby(["mode", "rank"], sort=False)["step_seconds"].first()
    found = pd.DataFrame({f"{lane}_share": busy.get(lane, 0.0) / busy.sum(axis=1) for lane in LANES})
    found["computing_share"] = busy["compute"] / steps
    found["step_seconds"] = steps
    return found.reset_index()


def lanes(lanes: pd.DataFrame) -> Table:
    return Table(
        title="What the lanes do",
        caption="Each lane's part of the time that all lanes of a rank work during one step, in the layout of the supplementary's figure; "
        "and the part of the step during which a block computes.",
        frame=shares(lanes),
        columns={
            "mode": "mode",
            "rank": "rank",
            **{f"{lane}_share": Column(lane, "{:.1%}") for lane in LANES},
            "computing_share": Column("step with a block computing", "{:.1%}"),
            "step_seconds": "step",
        },
        paper=paper_numbers("distzo2", "lanes"),
        notes=[RANDOM, "The link to the host is emulated by waiting; the paper's are four GPUs, OPT-1.3B, 2D."],
    )


ONE = "one process, 1 thread"


def speedups(throughput: pd.DataFrame) -> pd.DataFrame:
    """By mode: tokens per second, the ratio of one process's time to it, paired by round, and the process time of the busiest rank."""
    walls = throughput.groupby(["mode", "repeat"], sort=False, as_index=False).agg(
        step_seconds=("step_seconds", "max"), process_seconds=("process_seconds", "max"), tokens=("tokens", "first")
    )
    alone = walls[walls["mode"] == ONE].sort_values("repeat")["step_seconds"].to_numpy()
    lines = []
    for mode, rows in walls.groupby("mode", sort=False):
        own = rows.sort_values("repeat")
        found = ratio(alone, own["step_seconds"].to_numpy())
        lines.append(
            {
                "mode": mode,
                "tokens_per_second": float((own["tokens"] / own["step_seconds"]).median()),
                "speedup_ratio": found.value,
                "low_ratio": found.low,
                "high_ratio": found.high,
                "process_seconds": float(own["process_seconds"].median()),
            }
        )
    return pd.DataFrame(lines)


def throughput(throughput: pd.DataFrame) -> Table:
    found = speedups(throughput)
    found["interval"] = [f"{low:.2f} to {high:.2f}" for low, high in found[["low_ratio", "high_ratio"]].to_numpy(float)]
    return Table(
        title="Throughput",
        caption="Wall time of a step of the same global batch, in turns: by one process while the other rank rests, and by two ranks of "
        "one thread each. The interval holds the true median ratio with a probability of at least 95 %.",
        frame=found,
        columns={
            "mode": "mode",
            "tokens_per_second": "tokens/s",
            "speedup_ratio": Column("of one process", "{:.2f}"),
            "interval": "interval",
            "process_seconds": "processor time of the busiest rank",
        },
        paper=paper_numbers("distzo2", "headline"),
        notes=[RANDOM, "Two cores: more ranks could show no gain here."],
    )


def links(link: pd.DataFrame) -> pd.DataFrame:
    """By link rate: the median step of whole blocks and of slices, and the ratio of the two."""
    walls = link.groupby(["link_gigabytes_per_second", "mode", "repeat"], sort=False, as_index=False)["step_seconds"].max()
    medians = walls.groupby(["link_gigabytes_per_second", "mode"], sort=False)["step_seconds"].median().unstack("mode")
    found = pd.DataFrame({"whole_seconds": medians["DDP"], "sliced_seconds": medians["DDP, sliced"]})
    found["gain_ratio"] = found["whole_seconds"] / found["sliced_seconds"]
    uploaded = link.groupby(["link_gigabytes_per_second", "mode"])["uploaded_bytes"].median().unstack("mode")
    free = found["whole_seconds"].get(0.0, np.nan)
    rates = found.index.to_numpy(float)
    # Whichever is longer: a step with the link as it is, or the link with both ranks' bytes.
    bound = np.where(rates > 0, 2 * uploaded["DDP"].to_numpy(float) / np.where(rates > 0, 1e9 * rates, 1), 0)
    found["predicted_seconds"] = np.maximum(free, bound)
    return found.reset_index()


def link(link: pd.DataFrame) -> Table:
    found = links(link)
    found["rate"] = ["as it is" if r == 0 else f"{1000 * r:.0f} MB/s, emulated" for r in found["link_gigabytes_per_second"]]
    return Table(
        title="Whole blocks and slices over an emulated link to the host",
        caption="Wall time of a step on two ranks that share a link. The prediction is the longer of a step without a limit and of both "
        "ranks' uploads over the link.",
        frame=found,
        columns={
            "rate": "link",
            "whole_seconds": "whole blocks",
            "predicted_seconds": "predicted",
            "sliced_seconds": "slices",
            "gain_ratio": Column("gain", "{:.2f}"),
        },
        notes=[RANDOM, "The link is emulated by waiting in the lanes; it is not a measurement of any bus."],
    )
