"""DistZO2's tables: rows in, `Table` out."""

import numpy as np
import pandas as pd

from projects.distzo2.cost_model import (
    COMPUTE_SHARE,
    LINK_SHARE,
    Rates,
    hardware,
    predictions,
    sliced_compute_share,
)
from projects.distzo2.labels import (
    BATCH_A_GPU,
    BATCH_IN_ALL,
    DDP,
    FIRST_ORDER,
    HELD_OUT,
    LANES,
    LARGE,
    MODES,
    OWN_LINK,
    SHARED_LINK,
    SLICED,
    START,
    TWO_D,
    ZO2,
    one_process,
)
from projects.zo2.tables import gain_note, gains
from shared.statistics import ratio
from shared.tables import Column, Table, paper_numbers

RANDOM = "Random weights, random tokens: bits, bytes and speed do not depend on them."


def equality(equality: pd.DataFrame) -> Table:
    return Table(
        title="Ranks and one process",
        caption=(
            "How many of all ranks' losses and projected gradients differ in a bit from those of"
            " ZO2 in one process, which walks the same micro-batches in order, and whether all"
            " weights are equal to the last bit at the end."
        ),
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
            (
                "Naive restore is the obvious scheme, in which each rank makes only its own"
                " perturbation; it is here to be seen drifting."
            ),
        ],
    )


def per_rank(communication: pd.DataFrame) -> pd.DataFrame:
    """By mode and number of ranks: the most bytes of a rank, and those of the host link over the
    whole of the blocks.
    """
    found = communication.groupby(["mode", "ranks"], sort=False, as_index=False).agg(
        parameters=("parameters", "first"),
        micro_batches=("micro_batches", "first"),
        host_up_bytes=("host_up_bytes", "max"),
        all_up_bytes=("host_up_bytes", "sum"),
        host_down_bytes=("host_down_bytes", "max"),
        exchanged_bytes=("exchanged_bytes", "max"),
        scalar_bytes=("scalar_bytes", "max"),
    )
    replicated = found[~found["mode"].str.endswith(SLICED) & (found["mode"] != FIRST_ORDER)]
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
        caption=(
            "What the busiest rank moves over its link to the host, what it takes from other ranks'"
            " slices, and what it sends of losses; for first-order data parallelism the gradient"
            " that it gives to all-reduce."
        ),
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
    """By mode and depth the most device bytes of any rank, and their ratio to ZO2's at that
    depth.
    """
    found = memory.groupby(["mode", "ranks", "layers"], sort=False, as_index=False)[
        "device_peak_bytes"
    ].max()
    alone = found[found["mode"] == ZO2].set_index("layers")["device_peak_bytes"]
    found["zo2_ratio"] = found["device_peak_bytes"] / found["layers"].map(alone)
    return found


def memory(memory: pd.DataFrame) -> Table:
    return Table(
        title="Device memory of a rank",
        caption=(
            "The most bytes that torch hands out on a rank during a step of the same global batch."
        ),
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


def shares(lanes: pd.DataFrame) -> pd.DataFrame:
    """By mode and rank: each lane's part of the time that all of the rank's lanes work, and how
    much of the step it works.
    """
    lanes = lanes.assign(busy_seconds=lanes["end_seconds"] - lanes["begin_seconds"])
    busy = lanes.pivot_table(
        index=["mode", "rank"], columns="lane", values="busy_seconds", aggfunc="sum", sort=False
    ).fillna(0.0)
    steps = lanes.groupby(["mode", "rank"], sort=False)["step_seconds"].first()
    found = pd.DataFrame(
        {f"{lane}_share": busy.get(lane, 0.0) / busy.sum(axis=1) for lane in LANES}
    )
    found["computing_share"] = busy["compute"] / steps
    found["step_seconds"] = steps
    return found.reset_index()


def lanes(lanes: pd.DataFrame) -> Table:
    return Table(
        title="What the lanes do",
        caption=(
            "Each lane's part of the time that all lanes of a rank work during one step, in the"
            " layout of the supplementary's figure; and the part of the step during which a block"
            " computes."
        ),
        frame=shares(lanes),
        columns={
            "mode": "mode",
            "rank": "rank",
            **{f"{lane}_share": Column(lane, "{:.1%}") for lane in LANES},
            "computing_share": Column("step with a block computing", "{:.1%}"),
            "step_seconds": "step",
        },
        paper=paper_numbers("distzo2", "lanes"),
        notes=[
            RANDOM,
            (
                "The link to the host is emulated by waiting; the paper's are four and two GPUs,"
                " OPT-1.3B."
            ),
        ],
    )


def speedups(throughput: pd.DataFrame) -> pd.DataFrame:
    """By mode: tokens per second, the ratio of one process's time to it, paired by round, and the
    process time of the busiest rank.
    """
    walls = throughput.groupby(["mode", "repeat"], sort=False, as_index=False).agg(
        step_seconds=("step_seconds", "max"),
        process_seconds=("process_seconds", "max"),
        tokens=("tokens", "first"),
    )
    alone = walls[walls["mode"] == one_process(1)].sort_values("repeat")["step_seconds"].to_numpy()
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
    found["interval"] = [
        f"{low:.2f} to {high:.2f}"
        for low, high in found[["low_ratio", "high_ratio"]].to_numpy(float)
    ]
    return Table(
        title="Throughput",
        caption=(
            "Wall time of a step of the same global batch, in turns: by one process while the other"
            " rank rests, and by two ranks of one thread each. The interval holds the true median"
            " ratio with a probability of at least 95 %."
        ),
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
    walls = link.groupby(
        ["link_gigabytes_per_second", "mode", "repeat"], sort=False, as_index=False
    )["step_seconds"].max()
    medians = (
        walls.groupby(["link_gigabytes_per_second", "mode"], sort=False)["step_seconds"]
        .median()
        .unstack("mode")
    )
    found = pd.DataFrame({"whole_seconds": medians[DDP], "sliced_seconds": medians[DDP + SLICED]})
    found["gain_ratio"] = found["whole_seconds"] / found["sliced_seconds"]
    uploaded = (
        link.groupby(["link_gigabytes_per_second", "mode"])["uploaded_bytes"]
        .median()
        .unstack("mode")
    )
    free = found["whole_seconds"].get(0.0, np.nan)
    rates = found.index.to_numpy(float)
    # Whichever is longer: a step with the link as it is, or the link with both ranks' bytes.
    bound = np.where(
        rates > 0, 2 * uploaded[DDP].to_numpy(float) / np.where(rates > 0, 1e9 * rates, 1), 0
    )
    found["predicted_seconds"] = np.maximum(free, bound)
    return found.reset_index()


def link(link: pd.DataFrame) -> Table:
    found = links(link)
    found["rate"] = [
        "as it is" if r == 0 else f"{1000 * r:.0f} MB/s, emulated"
        for r in found["link_gigabytes_per_second"]
    ]
    return Table(
        title="Whole blocks and slices over an emulated link to the host",
        caption=(
            "Wall time of a step on two ranks that share a link. The prediction is the longer of a"
            " step without a limit and of both ranks' uploads over the link."
        ),
        frame=found,
        columns={
            "rate": "link",
            "whole_seconds": "whole blocks",
            "predicted_seconds": "predicted",
            "sliced_seconds": "slices",
            "gain_ratio": Column("gain", "{:.2f}"),
        },
        notes=[
            RANDOM,
            "The link is emulated by waiting in the lanes; it is not a measurement of any bus.",
        ],
    )


def accuracy(accuracy: pd.DataFrame) -> Table:
    ends = accuracy[accuracy["kind"] == "end"]
    return Table(
        title="Fine-tuning quality",
        caption=(
            f"After {int(accuracy['step'].max())} steps on the same global batches, on held-out"
            " examples. The claim is that all are one, so the digest of all weights is part of the"
            " table."
        ),
        frame=ends,
        columns={
            "mode": "mode",
            "ranks": "ranks",
            "seed": "seed",
            "test_loss": Column("test loss", "{:.6f}"),
            "test_accuracy": "test accuracy",
            "weights_sha256": "digest of the weights",
        },
        paper=paper_numbers("distzo2", "accuracy"),
        notes=[
            (
                "Ours: Amazon fine-food reviews, all-MiniLM-L6-v2, as in ZO2's table, with"
                " ZO2's learning rate; as many steps as the time allows."
            ),
            "The paper's: OPT-13B, which does not fit here.",
            *gain_note(gains(accuracy, "mode", START)),
        ],
    )


def curves(largebatch: pd.DataFrame) -> pd.DataFrame:
    """By global batch: mean loss of the first and the last tenth of the steps, and the roughness of
    the curve.

    Roughness is the root mean square of the differences of successive losses, over sqrt(2): of
    independent noise it is the standard deviation, and a slow fall leaves it alone. It was chosen
    before any curve was looked at.
    """
    lines = []
    for (mode, size), rows in largebatch.groupby(["mode", "batch_size"], sort=False):
        steps = rows[rows["kind"] == "step"].sort_values("step")["train_loss"].to_numpy(float)
        tenth = max(1, len(steps) // 10)
        (end,) = rows[rows["kind"] == "end"].to_dict("records")
        lines.append(
            {
                "mode": mode,
                "batch_size": size,
                "steps": len(steps),
                "first_loss": float(steps[:tenth].mean()),
                "last_loss": float(steps[-tenth:].mean()),
                "roughness_loss": float(np.sqrt(np.mean(np.diff(steps) ** 2) / 2)),
                "test_accuracy": end["test_accuracy"],
            }
        )
    return pd.DataFrame(lines)


def largebatch(largebatch: pd.DataFrame) -> Table:
    return Table(
        title="Training with large batches",
        caption=(
            "The loss of a step, averaged over the first and the last tenth of the steps. Roughness"
            " is the root mean square difference of successive losses over √2: what one step's loss"
            " strays by, without the slow fall."
        ),
        frame=curves(largebatch),
        columns={
            "mode": "mode",
            "batch_size": "global batch",
            "steps": "steps",
            "first_loss": Column("first losses", "{:.3f}"),
            "last_loss": Column("last losses", "{:.3f}"),
            "roughness_loss": Column("roughness", "{:.4f}"),
            "test_accuracy": "test accuracy",
        },
        paper=paper_numbers("distzo2", "largebatch"),
        notes=[
            (
                "Ours: handwritten digits, a small residual network from random weights. Its"
                " learning rate is the largest of 0.001, 0.002, 0.003, 0.005 and 0.01 with which"
                " the training loss stayed finite with every batch; with 0.003 it does for 64 and"
                " 256, not for 16."
            ),
            "The paper's: OPT-13B, fine-tuned; values read off a plot.",
        ],
    )


def errors(cost: pd.DataFrame) -> pd.DataFrame:
    """Measured and predicted steps; see `cost_model.predictions`."""
    return predictions(cost, MODES)[0]


def cost(cost: pd.DataFrame) -> Table:
    found, rates = predictions(cost, MODES)
    found["link"] = [
        f"{1000 * rate:.0f} MB/s, emulated" if rate else "as it is"
        for rate in found["link_gigabytes_per_second"]
    ]
    found = found.sort_values("kind", kind="stable")
    held = found[found["kind"] == HELD_OUT]["error_ratio"].abs()
    alone, both = (_speed(one) for one in rates.values())
    return Table(
        title="The cost model against measured steps",
        caption=(
            "Rates are fitted on the rows marked so and predict the others; of these half are off"
            f" by less than {held.median():.0%} and the worst is by {held.max():.0%}."
        ),
        frame=found,
        columns={
            "kind": "rows",
            "shape": "blocks x width",
            "batch_tokens": Column("tokens a step", "{:.0f}"),
            "mode": "mode",
            "link": "link to the host",
            "measured_seconds": "measured",
            "predicted_seconds": "predicted",
            "error_ratio": Column("off by", "{:+.0%}"),
        },
        notes=[
            RANDOM,
            f"One process: {alone}. Each of two at once: {both}.",
            (
                "From DDP's rows of kind fit come only the rates of links and of exchange, by how"
                " long the lanes were at it; their steps do not."
            ),
            (
                "With slices the ranks exchange over gloo, which needs the cores that compute; the"
                " model knows lanes that do not disturb one another."
            ),
        ],
    )


PREDICTED = "From assumed shares of datasheet rates."


def predicted(plan: pd.DataFrame) -> pd.DataFrame:
    """By model, GPU, number of GPUs, mode and links: predicted speed-ups over ZO2 on one GPU, one
    column a comparison and transfer.
    """
    what = (
        plan["same_batch"].map({BATCH_A_GPU: "gpu", BATCH_IN_ALL: "all"})
        + "_"
        + plan["transfer"]
        + "_ratio"
    )
    keys = ["model", "gpu", "gpus", "mode", "links"]
    found = plan.assign(what=what).pivot_table(
        index=keys, columns="what", values="speedup_ratio", sort=False
    )
    return found.reset_index().rename_axis(columns=None)


def plan(plan: pd.DataFrame) -> Table:
    found = predicted(plan[plan["model"] == LARGE])
    found["links"] = found["links"].map({OWN_LINK: "each its own", SHARED_LINK: "one for all"})
    rates = hardware()
    return Table(
        title="Predicted speed-up over ZO2 on one GPU, OPT-175B",
        caption=(
            f"{PREDICTED} Sequences of 2,048 tokens in float16; one on each share of the batch, or"
            " 8 in all."
        ),
        frame=found,
        columns={
            "gpu": "GPU",
            "gpus": "GPUs",
            "mode": "mode",
            "links": "links to the host",
            "gpu_replicated_ratio": Column("one a share, whole blocks", "{:.2f}"),
            "gpu_sliced_ratio": Column("one a share, slices", "{:.2f}"),
            "all_replicated_ratio": Column("8 in all, whole blocks", "{:.2f}"),
            "all_sliced_ratio": Column("8 in all, slices", "{:.2f}"),
        },
        paper=paper_numbers("distzo2", "headline"),
        predicted=True,
        notes=[
            *(f"{name}: {rates.loc[name, 'source']}." for name in dict.fromkeys(found["gpu"])),
            (
                f"Assumed: {COMPUTE_SHARE:.0%} of the peak rate of products, {LINK_SHARE:.0%} of"
                " that of memory and links. The paper's GPUs, their number and its batch are not"
                " known to us."
            ),
            (
                "A speed-up falls short of the number of GPUs where every rank draws all noise and"
                " updates all weights (8 in all), or where the link to the host is the slowest lane"
                " (one for all, whole blocks). With one sequence a share, PertP and 2D halve a"
                " rank's forwards."
            ),
        ],
    )


def sizes(plan: pd.DataFrame) -> Table:
    first = plan["gpu"].iloc[0]
    chosen = plan[
        (plan["gpu"] == first) & (plan["mode"] == DDP) & (plan["same_batch"] == BATCH_IN_ALL)
    ]
    keys = ["model", "gpus"]
    ways = chosen["links"] + "_" + chosen["transfer"] + "_ratio"
    found = (
        chosen.assign(way=ways)
        .pivot_table(index=keys, columns="way", values="speedup_ratio", sort=False)
        .reset_index()
    )
    sliced = chosen[(chosen["links"] == SHARED_LINK) & (chosen["transfer"] == "sliced")]
    whole = chosen[(chosen["links"] == SHARED_LINK) & (chosen["transfer"] == "replicated")]
    found = found.merge(
        sliced[[*keys, "tokens_per_second", "host_bytes", "device_bytes", "busiest"]], on=keys
    )
    found = found.merge(
        whole[[*keys, "busiest"]].rename(columns={"busiest": "busiest_whole"}), on=keys
    )
    return Table(
        title=f"Predicted by size of the model, DDP on {first}",
        caption=(
            f"{PREDICTED} Speed-up over ZO2 on one GPU, 8 sequences of 2,048 tokens in all; with a"
            " link to the host for each GPU, and with one for all. 2D is as fast: its ranks"
            " compute as much."
        ),
        frame=found,
        columns={
            "model": "model",
            "gpus": "GPUs",
            "own_replicated_ratio": Column("a link each, whole blocks", "{:.2f}"),
            "own_sliced_ratio": Column("a link each, slices", "{:.2f}"),
            "shared_replicated_ratio": Column("one link, whole blocks", "{:.2f}"),
            "busiest_whole": "busiest lane",
            "shared_sliced_ratio": Column("one link, slices", "{:.2f}"),
            "busiest": "busiest lane, slices",
            "tokens_per_second": "tokens/s, slices",
            "host_bytes": "uploaded by a rank, slices",
            "device_bytes": "weights and buffers of a GPU",
        },
        predicted=True,
        notes=["Activations and logits come on top of a GPU's bytes."],
    )


def computing(rows: pd.DataFrame) -> float:
    """Computing's part of the time that computing, upload and offload are busy, by their mean
    shares.
    """
    moving = float((rows["upload_share"] + rows["offload_share"]).mean())
    return float(rows["compute_share"].mean()) / (float(rows["compute_share"].mean()) + moving)


def slicing(lanes: pd.DataFrame) -> pd.DataFrame:
    """`computing` by mode with whole blocks and with slices, and what the second must be by the
    first (`expected_share`).

    Exchange is left out: it has no counterpart with whole blocks.

    Args:
        lanes: one row a rank: `mode`, `slicing` ("yes" or "no"), and the shares of its lanes.
    """
    lines = []
    for mode, rows in lanes.groupby("mode", sort=False):
        whole, sliced = rows[rows["slicing"] == "no"], rows[rows["slicing"] == "yes"]
        if len(whole) and len(sliced):
            before = computing(whole)
            line = {
                "mode": mode,
                "ranks": len(whole),
                "whole_share": before,
                "sliced_share": computing(sliced),
            }
            lines.append(
                {**line, "expected_share": sliced_compute_share(before, 1 - before, len(whole))}
            )
    return pd.DataFrame(
        lines, columns=["mode", "ranks", "whole_share", "sliced_share", "expected_share"]
    )


def measured_slicing(lanes: pd.DataFrame) -> pd.DataFrame:
    """`slicing` of the experiment's rows."""
    found = shares(lanes)
    found["slicing"] = found["mode"].str.endswith(SLICED).map({True: "yes", False: "no"})
    return slicing(found.assign(mode=found["mode"].str.removesuffix(SLICED)))


def streams(lanes: pd.DataFrame, plan: pd.DataFrame) -> Table:
    chosen = plan[
        (plan["model"] == "opt-1.3b")
        & (plan["gpu"] == plan["gpu"].iloc[0])
        & (plan["gpus"] == 4)
        & (plan["mode"] == TWO_D)
    ]
    chosen = chosen[(chosen["links"] == OWN_LINK) & (chosen["same_batch"] == BATCH_A_GPU)]
    by_model = [
        computing(chosen[chosen["transfer"] == transfer]) for transfer in ("replicated", "sliced")
    ]
    printed = paper_numbers("distzo2", "lanes")
    paper = slicing(printed[printed["figure"] == 1])
    paper["source"] = "from supplementary figure 1, OPT-1.3B"
    two = (
        printed[printed["figure"] == 2]
        .groupby(["mode", "link"])[["compute_share", "upload_share"]]
        .mean()
    )
    ratios = two["compute_share"] / two["upload_share"]
    return Table(
        title="What slicing does to the streams",
        caption=(
            "Computing's part of the time that computing, upload and offload are busy; and what it"
            " must be with slices if an N-th of a block takes an N-th of the time to move."
        ),
        frame=measured_slicing(lanes),
        columns={
            "mode": "mode",
            "ranks": "ranks",
            "whole_share": Column("whole blocks", "{:.1%}"),
            "sliced_share": Column("slices", "{:.1%}"),
            "expected_share": Column("slices, from whole blocks", "{:.1%}"),
        },
        paper=paper,
        notes=[
            RANDOM,
            "The link to the host is emulated by waiting.",
            (
                f"The cost model, from datasheet rates, predicts {by_model[0]:.0%} and"
                f" {by_model[1]:.0%} for OPT-1.3B, 2D on four {chosen['gpu'].iloc[0]}."
            ),
            (
                "In the supplementary's figure 2 (two GPUs with NVLink, table `lanes`) computing"
                f" takes {ratios['DDP', 'NVLink']:.1f} times as long as the upload with DDP and"
                f" {ratios['PertP', 'NVLink']:.1f} times with PertP: nearly twice, so that noise"
                " and update, which a rank of either makes in full, are a small part there."
            ),
        ],
    )


def _speed(rates: Rates) -> str:
    """In words. Steps of tiny models may fit best with arithmetic, or noise, that takes no time."""
    arithmetic = (
        f"{1e-9 / rates.seconds_per_flop:.0f} GFLOP/s"
        if rates.seconds_per_flop
        else "arithmetic in no time"
    )
    return f"{arithmetic}, {1e9 * rates.seconds_per_draw:.1f} ns a number drawn"
