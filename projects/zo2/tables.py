"""ZO2's tables: rows in, `Table` out."""

import pandas as pd

from projects.zo2 import labels
from projects.zo2.labels import (
    FULL,
    IN_MEMORY,
    LIMITED,
    MEMORY,
    ON_DEVICE,
    OVERLAP,
    RESIDENT,
    SYNCHRONOUS,
)
from shared.claims import VerdictWord
from shared.statistics import Mean, mean_interval, ratio
from shared.tables import Column, Table, paper_numbers


def equality(equality: pd.DataFrame) -> Table:
    summed = {
        "differing_losses": "sum",
        "differing_gradients": "sum",
        "differing_bits": "sum",
        "largest_difference": "max",
    }
    grouped = equality.groupby(["kind", "variant"], sort=False)
    frame = (
        grouped.agg({"model": "count", "parameters": "sum", **summed})
        .rename(columns={"model": "models"})
        .reset_index()
    )
    models = ", ".join(dict.fromkeys(equality["model"]))
    return Table(
        title="Bits in which ZO2 differs from MeZO",
        caption=(
            f"After {equality['steps'].iloc[0]} steps and a flush, summed over the models"
            f" ({models}): losses, projected gradients and parameter bits that are not those of"
            " plain MeZO with the same noise. The learning rate changes at every step and weight"
            " decay is on. Random weights: equality is a property of the arithmetic."
        ),
        frame=frame.sort_values("kind", ascending=False, kind="stable"),
        columns={
            "kind": "kind",
            "variant": "variant",
            "models": "models",
            "parameters": "parameters",
            "differing_losses": "losses",
            "differing_gradients": "gradients",
            "differing_bits": "bits",
            "largest_difference": Column("largest difference", "{:.1e}"),
        },
        notes=[
            (
                "'Known fault': a known bug of public implementations, made here on purpose to show"
                " what it does."
            ),
            (
                "The authors' tests compare printed losses and find them equal; no table of the"
                " paper's on this was accessible to us."
            ),
        ],
    )


def memory(memory: pd.DataFrame) -> Table:
    keys = ["model", "layers", "counter"]
    measured = memory[memory["peak_bytes"].notna()]
    frame = measured.pivot_table(
        index=keys, columns="method", values="peak_bytes", aggfunc="first"
    ).rename(columns={name: method.column for name, method in MEMORY.items()})
    frame = frame[[m.column for m in MEMORY.values() if m.column in frame.columns]]
    if "mezo_bytes" in frame.columns:
        frame["saving_share"] = 1 - frame["zo2_bytes"] / frame["mezo_bytes"]
    frame["host_bytes"] = measured[measured["method"] == "zo2-3"].set_index(keys)["host_bytes"]
    headings = {
        "model": "model",
        "layers": "layers",
        "counter": "counter",
        **{method.column: method.label for method in MEMORY.values()},
        "saving_share": "saved against MeZO",
        "host_bytes": "on the host",
    }
    return Table(
        title="Peak device memory against depth",
        caption=(
            "Highest number of bytes alive on the device during a step, OPT shapes with untied"
            f" embeddings, batch 1, {memory['tokens'].iloc[0]} tokens, {memory['dtype'].iloc[0]}."
            " Random weights: memory does not depend on them."
        ),
        frame=frame.reset_index().sort_values("layers", kind="stable"),
        columns={
            name: heading
            for name, heading in headings.items()
            if name in frame.columns or name in keys
        },
        paper=paper_numbers("zo2", "memory"),
        notes=[
            (
                "The counter 'allocator' counts torch's allocations one by one; the offloaded"
                " blocks lie outside it, in the last column."
            ),
            (
                "MeZO draws the noise of a whole tensor; ZO2 draws it in pieces. 'Nothing"
                " offloaded' shows what that alone saves."
            ),
        ],
    )


def limit(limit: pd.DataFrame) -> Table:
    frame = limit.assign(method=limit["method"].map(LIMITED))
    return Table(
        title="A pretrained model under a memory limit",
        caption=(
            f"{limit['model'].iloc[0]} on Wikipedia text, {limit['tokens'].iloc[0]} tokens a step,"
            " float32. Each line is a process of its own; the limit holds for all its private"
            " writable memory (RLIMIT_DATA), Python and torch included."
        ),
        frame=frame,
        columns={
            "method": "method",
            "limit_bytes": "limit",
            "finished": "finished",
            "peak_rss_bytes": "highest resident memory",
            "last_loss": Column("last loss", "{:.6f}"),
            "outcome": "outcome",
        },
        notes=[
            "All draw the same noise. 'Nothing offloaded' is ZO2's own arithmetic with every block"
            " on the device, a leaner MeZO."
        ],
    )


def timings(
    frame: pd.DataFrame, baseline: str, by: list[str], variant: str = "variant"
) -> pd.DataFrame:
    """Median step time per (by, variant), and its ratio to `baseline`'s with a 95 % interval over
    the rounds.
    """
    found = []
    for key, group in frame.groupby(by, sort=False):
        reference = (
            group[group[variant] == baseline].sort_values("repeat")["step_seconds"].to_numpy()
        )
        for name, rounds in group.groupby(variant, sort=False):
            seconds = rounds.sort_values("repeat")["step_seconds"].to_numpy()
            against = ratio(seconds, reference)
            found.append(
                {
                    **dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)),
                    variant: name,
                    "step_seconds": float(pd.Series(seconds).median()),
                    "time_ratio": against.value,
                    "time_low_ratio": against.low,
                    "time_high_ratio": against.high,
                    "interval": (
                        f"{against.low:.3f} to {against.high:.3f}"
                        if against.coverage >= 0.95
                        else "too few rounds"
                    ),
                    "coverage_probability": against.coverage,
                    "bytes_up": rounds["bytes_up"].iloc[-1],
                    "bytes_down": rounds["bytes_down"].iloc[-1],
                    "waited_seconds": float(rounds["waited_seconds"].median()),
                }
            )
    return pd.DataFrame(found)


INTERVALS = (
    "Intervals are order statistics of the paired ratios; with six rounds or more they hold the"
    " true median with 95 % or more."
)


def throughput(throughput: pd.DataFrame) -> Table:
    baseline = ON_DEVICE
    if baseline not in set(throughput["variant"]):
        baseline = str(throughput["variant"].iloc[0])
    frame = timings(throughput, baseline, ["model", "tokens"])
    frame.insert(3, "tokens_per_second", frame["tokens"] / frame["step_seconds"])
    return Table(
        title="Throughput with and without offloading",
        caption=(
            f"Median over {throughput['repeat'].nunique()} rounds in which each variant made one"
            f" step in turn, one thread of compute. Ratios are to '{baseline}' in the same round."
        ),
        frame=frame,
        columns={
            "model": "model",
            "variant": "variant",
            "tokens": "tokens a step",
            "tokens_per_second": "tokens/s",
            "time_ratio": "time against resident",
            "interval": "interval",
            "bytes_up": Column("up a step", _megabytes),
            "bytes_down": Column("down a step", _megabytes),
            "waited_seconds": "waited for uploads",
        },
        notes=[
            INTERVALS,
            (
                "'Cold' writes through to the disk and drops the page cache, so that each read is a"
                " real one; 'warm' leaves both to the system."
            ),
            (
                "Tokens count once, though each goes through two forwards. Absolute times depend on"
                " the machine and its load; the ratios are paired."
            ),
        ],
    )


def sensitivity(sensitivity: pd.DataFrame) -> Table:
    frame = cost_of_offloading(sensitivity)
    return Table(
        title="Cost of offloading against tokens per step",
        caption=(
            "Step time from a cold disk over step time with everything on the device; small OPT"
            " shape with random weights."
        ),
        frame=frame,
        columns={
            "batch_size": "batch",
            "sequence": "sequence",
            "tokens": "tokens",
            "overlap_ratio": "with overlap",
            "interval": "interval",
            "sync_ratio": "without",
            "predicted_ratio": "predicted with overlap",
            "lane_ratio": "longest lane over compute",
        },
        notes=[
            (
                "Predicted: what the resident step takes, or the longest lane plus what is outside"
                " the blocks, whichever is longer. It takes the lanes for independent; on a CPU"
                " they share memory bandwidth and cores with the compute."
            ),
            INTERVALS,
        ],
    )


def cost_of_offloading(sensitivity: pd.DataFrame) -> pd.DataFrame:
    """Per number of tokens: measured ratios with and without overlap, and the predicted one."""
    found = []
    for (batch, sequence, tokens), group in sensitivity.groupby(
        ["batch_size", "sequence", "tokens"], sort=True
    ):
        seconds = {
            name: rounds.sort_values("repeat")["step_seconds"].to_numpy()
            for name, rounds in group.groupby("variant")
        }
        lanes = group.iloc[0]
        overlap, sync = (
            ratio(seconds[OVERLAP], seconds[RESIDENT]),
            ratio(seconds[SYNCHRONOUS], seconds[RESIDENT]),
        )
        resident = float(pd.Series(seconds[RESIDENT]).median())
        transfers = max(lanes["upload_lane_seconds"], lanes["offload_lane_seconds"])
        outside = max(0.0, resident - lanes["compute_lane_seconds"])
        found.append(
            {
                "batch_size": batch,
                "sequence": sequence,
                "tokens": tokens,
                "overlap_ratio": overlap.value,
                "overlap_low_ratio": overlap.low,
                "overlap_high_ratio": overlap.high,
                "interval": f"{overlap.low:.3f} to {overlap.high:.3f}",
                "sync_ratio": sync.value,
                "predicted_ratio": max(1.0, (outside + transfers) / resident),
                "lane_ratio": transfers / lanes["compute_lane_seconds"],
            }
        )
    return pd.DataFrame(found).sort_values("tokens")


def ablation(ablation: pd.DataFrame) -> Table:
    frame = timings(ablation, FULL, ["tier"])
    extra = (
        ablation.groupby(["tier", "variant"], sort=False)[["buffers", "differing_losses"]]
        .last()
        .reset_index()
    )
    frame = frame.merge(extra, on=["tier", "variant"])
    full = frame[frame["variant"] == FULL].set_index("tier")
    frame["up_ratio"] = frame["bytes_up"] / frame["tier"].map(full["bytes_up"])
    frame["down_ratio"] = frame["bytes_down"] / frame["tier"].map(full["bytes_down"])
    return Table(
        title="What each part is worth",
        caption=(
            "Each line takes one part of ZO2 away. Times are paired with 'full' round by round;"
            " small Llama shape with random weights."
        ),
        frame=frame,
        columns={
            "tier": "blocks rest in",
            "variant": "variant",
            "up_ratio": Column("uploads", "{:.0f}x"),
            "down_ratio": Column("offloads", "{:.0f}x"),
            "time_ratio": "time",
            "interval": "interval",
            "buffers": Column("device buffers", "{:.0f}"),
            "differing_losses": "losses that differ",
        },
        notes=[
            INTERVALS,
            (
                "Without reused slots every visit allocates a buffer of its own; how many addresses"
                " that makes is up to the allocator."
            ),
        ],
    )


def lowbit(lowbit: pd.DataFrame) -> Table:
    return Table(
        title="Low-bit storage of the blocks",
        caption=(
            f"MiniLM on fine-food reviews, {lowbit['steps'].iloc[0]} steps, pristine probes."
            " 'Survives': share of the stored values that the first update changed, and the cosine"
            " of that change with the update."
        ),
        frame=lowbit,
        columns={
            "storage_dtype": "stored as",
            "rounding": "rounding",
            "offloaded_bytes": "bytes a block",
            "surviving_share": "survives",
            "update_cosine": Column("cosine", "{:.3f}"),
            "largest_loss_difference": Column("largest loss difference", "{:.1e}"),
            "test_loss": Column("test loss", "{:.4f}"),
            "test_accuracy": "test accuracy",
        },
        notes=[
            "Where nothing survives (a cosine of –), the model does not train at all: the update is"
            " smaller than half a step of the stored format."
        ],
    )


def drift(drift: pd.DataFrame) -> Table:
    return Table(
        title="Drift of the weights",
        caption=(
            f"What {int(drift['steps'].max())} steps do to the weights of MiniLM by perturbing and"
            " restoring alone (learning rate 0), and with updates at a learning rate of"
            f" {drift['learning_rate'].max():g}. The yardstick is the exact update of the same"
            " directions."
        ),
        frame=drift,
        columns={
            "dtype": "weights",
            "probe": "probe",
            "drifted_share": Column("changed at rate 0", "{:.1%}"),
            "drift_ratio": Column("drift against update", "{:.3g}x"),
            "updated_share": Column("changed with updates", "{:.1%}"),
            "update_cosine": Column("cosine with the update", "{:.3f}"),
        },
        notes=[
            "'inplace' shifts the weights as MeZO does; 'fresh' forms the shifted weights beside"
            " them, and is what the command takes for bfloat16.",
            "The cosine is that of the whole change with the exact update: what is lost is drift"
            " and, in 16 bits, updates smaller than half a step of the format.",
        ],
    )


def gains(
    accuracy: pd.DataFrame, column: str = "method", start: str = labels.ZERO_SHOT
) -> tuple[Mean, int] | None:
    """By how much ZO2's loss on held-out examples is below that of the model as it was, mean over
    seeds, and how many there are; None where one of the two is missing.

    Args:
        column: of the methods' names.
        start: the name of the model as it was.
    """
    ends = accuracy[accuracy["kind"] == "end"]
    before = ends[ends[column] == start]["test_loss"]
    after = ends[ends[column] == labels.ZO2]["test_loss"]
    if before.empty or after.empty:
        return None
    return mean_interval(before.iloc[0] - after), len(after)


def learnt_alike(close: bool, same: bool, gained: Mean, seeds: int) -> VerdictWord:
    """Whether trained models are the same: two that have learnt nothing do not count.

    Args:
        close: their accuracies and losses on held-out data are equal.
        same: so is every bit of their weights.
        gained: by how much the loss is below that of the model as it was, over so many `seeds`.
    """
    if not close or (seeds >= 5 and gained.low <= 0):
        return "fails"
    return "holds" if same and seeds >= 5 else "partly"


def gain_note(gained: tuple[Mean, int] | None) -> list[str]:
    """What `gains` found, as a note of a table."""
    if gained is None:
        return []
    mean, seeds = gained
    return [
        f"ZO2's test loss is {mean.value:.4f} below that of the model as it was, mean over"
        f" {seeds} seeds (95 %: {mean.low:.4f} to {mean.high:.4f})."
    ]


def accuracy(accuracy: pd.DataFrame) -> Table:
    ends = accuracy[accuracy["kind"] == "end"]
    return Table(
        title="Fine-tuning quality",
        caption=(
            f"After {int(accuracy['step'].max())} steps on held-out examples. The claim is that"
            " MeZO and ZO2 are the same, so the digest of all weights is part of the table. One"
            " learning rate, nothing tuned on the test split. The model as it was (zero-shot) is"
            " what training must beat."
        ),
        frame=ends,
        columns={
            "method": "method",
            "seed": "seed",
            "test_loss": Column("test loss", "{:.6f}"),
            "test_accuracy": "test accuracy",
            "weights_sha256": "digest of the weights",
        },
        notes=[
            "First-order training of the same number of steps is shown for scale; it needs"
            " gradients, activations and optimizer state.",
            *gain_note(gains(accuracy)),
        ],
    )


def peers(peers: pd.DataFrame) -> Table:
    directions = peers[peers["peer_cosine"].notna()]
    forwards = peers[peers["forward_seconds"].notna()].groupby("peer", sort=False)
    lines = [
        {
            "peer": row.peer,
            "what": f"update against probe, {row.shape}",
            "result": f"cosine {row.peer_cosine:.3f} (ours {row.zo2_cosine:.3f})",
        }
        for row in directions.itertuples()
    ]
    memory = forwards.get_group(IN_MEMORY)["forward_seconds"].to_numpy()
    for name, rounds in forwards:
        against = ratio(rounds["forward_seconds"].to_numpy(), memory)
        trains = (
            f"{int(rounds['trainable_tensors'].iloc[0])} of {int(rounds['tensors'].iloc[0])}"
            " tensors trainable"
        )
        lines.append(
            {
                "peer": name,
                "what": "forward, blocks on disk",
                "result": (
                    f"{against.value:.2f}x in memory ({against.low:.2f} to {against.high:.2f});"
                    f" {trains}; loss {'equal' if rounds['equal_loss'].all() else 'different'}"
                ),
            }
        )
    return Table(
        title="Other implementations",
        caption="What installable packages do on the same inputs, in the same run.",
        frame=pd.DataFrame(lines),
        notes=[
            "mezo 0.0.1 updates tensors of more than 100,000 elements row by row: unless a row is a"
            " multiple of 16 long, not along its probe."
        ],
    )


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value else "–"
