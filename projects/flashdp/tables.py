"""FlashDP's tables: rows in, `Table` out."""

import pandas as pd

from projects.flashdp import labels
from shared.statistics import ratio
from shared.tables import Column, Table, human_bytes, paper_numbers

CELL = ["model", "batch_size", "tokens"]
INTERVAL = (
    "Shares are medians over rounds in which every method made one step in turn; the interval holds"
    " the true median with a probability of at least 95 % where there are six rounds; else it spans"
    " them all. Process time on one thread on a CPU, wall time on a GPU."
)
FLAT = (
    "Flat clipping (FGC, ghost, GhostClip, BK) takes one norm over all layers: another algorithm,"
    " here for its speed and memory."
)
RANDOM = "Random weights: speed and memory do not depend on them."


def speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Per cell and method: throughput, its share of the non-private one with an interval, extra
    peak bytes and their ratio.
    """
    lines = []
    for cell, rows in frame.groupby(CELL, sort=False):
        timed = rows[rows["step_seconds"].notna()]
        plain = timed.loc[timed["method"] == labels.NON_PRIVATE, "step_seconds"].to_numpy()
        peaks = (
            rows[rows["peak_bytes"].notna()].set_index("method")["peak_bytes"]
            if "peak_bytes" in rows
            else pd.Series(dtype=float)
        )
        for method in dict.fromkeys(rows["method"]):
            own = timed.loc[timed["method"] == method]
            share = (
                ratio(plain, own["step_seconds"].to_numpy())
                if len(own) and len(own) == len(plain)
                else None
            )
            lines.append(
                {
                    **dict(zip(CELL, cell, strict=True)),
                    "method": method,
                    "clipping": rows.loc[rows["method"] == method, "clipping"].iloc[0],
                    "tokens_per_second": own["tokens_per_second"].median() if len(own) else None,
                    "throughput_share": share.value if share else None,
                    "low_share": share.low if share else None,
                    "high_share": share.high if share else None,
                    "peak_bytes": peaks.get(method),
                    "memory_ratio": (
                        peaks.get(method) / peaks[labels.NON_PRIVATE]
                        if method in peaks and labels.NON_PRIVATE in peaks
                        else None
                    ),
                }
            )
    return pd.DataFrame(lines)


def _speed_table(frame: pd.DataFrame, title: str, caption: str) -> Table:
    found = speeds(frame)
    found["interval"] = [
        f"{100 * low:.0f} to {100 * high:.0f} %" if low == low else "–"
        for low, high in found[["low_share", "high_share"]].to_numpy(float)
    ]
    return Table(
        title=title,
        caption=caption,
        frame=found,
        columns={
            "model": "model",
            "batch_size": "batch",
            "tokens": "tokens",
            "method": "method",
            "clipping": "clipping",
            "tokens_per_second": "tokens/s",
            "throughput_share": Column("of non-private", "{:.1%}"),
            "interval": "interval",
            "peak_bytes": "extra memory",
            "memory_ratio": Column("to non-private", "{:.2f}x"),
        },
        notes=[
            INTERVAL,
            FLAT,
            RANDOM,
            "Extra memory: the most bytes alive in a step beyond parameters and optimizer state.",
        ],
    )


def batch_size(batch_size: pd.DataFrame) -> Table:
    return _speed_table(
        batch_size,
        "Throughput and memory against the batch size",
        "The paper's table 1 in structure; we had no access to its cells. AdamW, noise included,"
        " per-sample losses.",
    )


def sequence_length(sequence_length: pd.DataFrame) -> Table:
    return _speed_table(
        sequence_length,
        "Throughput and memory against the sequence length",
        "One number of tokens a step. What Gram matrices cost grows with the length; what an"
        " instantiated gradient costs shrinks.",
    )


def amp(amp: pd.DataFrame) -> Table:
    lines = []
    for backend, rows in amp[amp["kind"] != "time"].groupby("backend", sort=False):
        differences = rows["relative_difference"].dropna()
        lines.append(
            {
                "what": f"clipped gradient, backend {backend}: bfloat16 against float32",
                "result": (
                    f"largest relative difference of a parameter {differences.max():.2e}, median"
                    f" {differences.median():.2e}"
                ),
            }
        )
        lines.append(
            {
                "what": f"what one sample adds to one group, backend {backend}, bfloat16",
                "result": f"at most {rows['largest_contribution_ratio'].max():.6f} of the bound",
            }
        )
    for dtype, share in mixed_precision(amp).items():
        lines.append(
            {
                "what": f"FlashDP of non-private, {dtype}",
                "result": f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})",
            }
        )
    times = amp[amp["kind"] == "time"].pivot_table(
        index="repeat", columns=["method", "autocast"], values="step_seconds"
    )
    gain = ratio(
        times[(labels.FLASHDP, "float32")].to_numpy(),
        times[(labels.FLASHDP, "bfloat16")].to_numpy(),
    )
    lines.append(
        {
            "what": "FlashDP in bfloat16 against float32",
            "result": f"{gain.value:.2f}x as fast ({gain.low:.2f} to {gain.high:.2f})",
        }
    )
    return Table(
        title="Mixed precision",
        caption="torch.autocast with bfloat16; parameters, sums and noise stay in float32.",
        frame=pd.DataFrame(lines),
        notes=[
            "The speed of bfloat16 on this CPU is not what the paper's appendix E.2 is about.",
            RANDOM,
        ],
    )


def mixed_precision(amp: pd.DataFrame) -> dict:
    """FlashDP's share of the non-private throughput by dtype."""
    times = amp[amp["kind"] == "time"].pivot_table(
        index="repeat", columns=["method", "autocast"], values="step_seconds"
    )
    return {
        dtype: ratio(
            times[(labels.NON_PRIVATE, dtype)].to_numpy(), times[(labels.FLASHDP, dtype)].to_numpy()
        )
        for dtype in ("float32", "bfloat16")
    }


def parallel(parallel: pd.DataFrame) -> Table:
    lines = []
    for (layout, method), rows in parallel[parallel["kind"] == "equal"].groupby(
        ["layout", "method"], sort=False
    ):
        lines.append(
            {
                "layout": layout,
                "what": f"released gradient against one process, {method}",
                "result": f"relative difference at most {rows['relative_difference'].max():.1e}",
                "sent_bytes": rows["sent_bytes"].max(),
            }
        )
    for layout, share in parallel_shares(parallel).items():
        lines.append(
            {
                "layout": layout,
                "what": "throughput of FlashDP over non-private",
                "result": f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})",
            }
        )
    return Table(
        title="Data parallel and pipeline",
        caption=(
            "Two processes. Data parallel: each clips its own samples, sums are added once, noise"
            " is the same on both. Pipeline: two stages, GPipe schedule."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "layout": "layout",
            "what": "what",
            "result": "result",
            "sent_bytes": Column(
                "given to all_reduce by a rank",
                lambda value: human_bytes(value) if value == value else "–",
            ),
        },
        notes=[
            (
                "Stages of a pipeline exchange activations and their gradients as without privacy,"
                " and nothing else."
            ),
            INTERVAL,
        ],
    )


def parallel_shares(parallel: pd.DataFrame) -> dict:
    """FlashDP's share of the non-private throughput by layout: the slower rank of each round
    counts.
    """
    times = (
        parallel[parallel["kind"] == "time"]
        .groupby(["layout", "method", "repeat"], sort=False)["step_seconds"]
        .max()
    )
    return {
        layout: ratio(
            times[layout, labels.NON_PRIVATE].to_numpy(), times[layout, labels.FLASHDP].to_numpy()
        )
        for layout in times.index.get_level_values("layout").unique()
    }


def utility(utility: pd.DataFrame) -> Table:
    ends = utility[utility["kind"] == "end"]
    frame = ends.groupby(["method", ends["target_epsilon"].fillna(float("inf"))], sort=False).agg(
        runs=("seed", "count"), noise_scale=("noise_scale", "first"),
        spent_epsilon=("spent_epsilon", "max"),
        held_out_loss=("held_out_loss", "mean"), lowest_loss=("held_out_loss", "min"),
        highest_loss=("held_out_loss", "max"),
    ).reset_index()  # fmt: skip
    frame["target"] = [
        f"{value:g}" if value != float("inf") else "∞" for value in frame["target_epsilon"]
    ]
    return Table(
        title="Held-out loss at several epsilon",
        caption=(
            f"WordNet's glosses of nouns, one gloss a record, {int(ends['step'].max())} steps of"
            " AdamW from random weights; mean of each record's mean loss, in nats a token. One"
            " learning rate and one bound for all."
        ),
        frame=frame,
        columns={
            "method": "method",
            "target": "epsilon",
            "noise_scale": Column("noise multiplier", "{:.3f}"),
            "spent_epsilon": Column("spent", "{:.3f}"),
            "runs": "runs",
            "held_out_loss": Column("held-out loss", "{:.4f}"),
            "lowest_loss": Column("lowest", "{:.4f}"),
            "highest_loss": Column("highest", "{:.4f}"),
        },
        notes=[
            (
                "Poisson sampling; the tokenizer is trained on other parts of WordNet, which count"
                " as public."
            ),
            (
                "Explicit clipping has the batches and the noise of FlashDP's run with its seed;"
                " flat clipping is another algorithm. Both ran with the first seed alone."
            ),
        ],
    )


def cost(cost: pd.DataFrame) -> Table:
    return Table(
        title="Operations and bytes of a step",
        caption=(
            "Counted operation by operation. Operations: forward, backward and clipping. Bytes:"
            " what the operations of a step read and write, caches aside."
        ),
        frame=costs(cost),
        columns={
            "method": "method",
            "clipping": "clipping",
            "step_flops": Column("operations", lambda value: f"{value / 1e9:,.2f} G"),
            "flops_ratio": Column("of non-private", "{:.3f}x"),
            "redundant_share": Column("FlashDP computes less by", "{:.1%}"),
            "moved_bytes": "moved",
            "moved_ratio": Column("of non-private", "{:.2f}x"),
            "movement_share": Column("FlashDP moves less by", "{:.1%}"),
        },
        paper=paper_numbers("flashdp", "headline"),
        notes=[
            (
                "In what could be read the paper does not say of what its 20 % and 50 % are parts."
                " Here: of all operations of a step and of all bytes that its operations move."
            ),
            FLAT,
        ],
    )


def costs(cost: pd.DataFrame) -> pd.DataFrame:
    """Each method's counts with what FlashDP saves of them."""
    frame = cost.set_index("method")
    flash, plain = frame.loc[labels.FLASHDP], frame.loc[labels.NON_PRIVATE]
    frame = frame.assign(
        flops_ratio=frame["step_flops"] / plain["step_flops"],
        moved_ratio=frame["moved_bytes"] / plain["moved_bytes"],
        redundant_share=1 - flash["step_flops"] / frame["step_flops"],
        movement_share=1 - flash["moved_bytes"] / frame["moved_bytes"],
    )
    return frame.reset_index()


def memory(memory: pd.DataFrame) -> Table:
    frame = memory.pivot_table(
        index=[*CELL, "parameters"],
        columns="method",
        values="peak_bytes",
        aggfunc="first",
        sort=False,
    )
    frame = frame[list(dict.fromkeys(memory["method"]))]
    frame["flash_ratio"] = frame[labels.FLASHDP] / frame[labels.NON_PRIVATE]
    others = [
        name
        for name in frame.columns
        if name not in (labels.NON_PRIVATE, labels.FLASHDP, "flash_ratio")
    ]
    for name in others:
        frame[f"{name} ratio"] = frame[name] / frame[labels.FLASHDP]
    return Table(
        title="Peak memory of a step",
        caption=(
            "The most bytes alive in a step beyond parameters and AdamW's state. SmolLM2-135M has"
            " its pretrained weights, untied."
        ),
        frame=frame.reset_index(),
        columns={
            "model": "model",
            "batch_size": "batch",
            "tokens": "tokens",
            "parameters": Column("parameters", "{:,}"),
            labels.NON_PRIVATE: Column(labels.NON_PRIVATE, human_bytes),
            labels.FLASHDP: Column(labels.FLASHDP, human_bytes),
            "flash_ratio": Column("FlashDP to non-private", "{:.3f}x"),
            **{name: Column(name, human_bytes) for name in others},
            **{f"{name} ratio": Column(f"{name} to FlashDP", "{:.2f}x") for name in others},
        },
        notes=[
            "'explicit' forms one layer's per-sample gradients at a time; Opacus keeps those of all"
            " layers until the step."
        ],
    )
