"""PAHQ's tables: rows in, `Table` out. No table of the paper could be had, so none has its numbers;
what was published of ACDC stands beside the areas.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from projects.pahq.labels import (
    AREA,
    ATTRIBUTION,
    CIRCUIT,
    EFFECTS,
    FP32,
    PAHQ,
    PLAIN,
    RTN,
)
from shared.statistics import Mean, Ratio, mean_interval, ratio
from shared.tables import Column, Table, human_bytes, human_seconds, paper_numbers


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value a seed, and its interval; of one seed, the value alone."""
    found = mean_interval(values)
    return Mean(found.value, found.value, found.value) if np.isnan(found.low) else found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """'0.221 ± 0.008': a mean and half the width of its interval, where it has one."""
    value = mean(values)
    shown = f"{value.value:.{digits}f}"
    half = (value.high - value.low) / 2
    return shown if half == 0 else f"{shown} ± {half:.{digits}f}"


def small(values: Sequence[float]) -> str:
    """As `spread`, for values of any size: '4.3e-04 ± 0.5e-04'."""
    value = mean(values)
    if value.value == 0:
        return "0"
    power = int(np.floor(np.log10(abs(value.value))))
    half = (value.high - value.low) / 2
    shown = f"{value.value / 10**power:.2f}"
    return (shown if half == 0 else f"({shown} ± {half / 10**power:.2f})") + f"e{power:+d}"


def _by_cell(
    frame: pd.DataFrame, keys: list[str], columns: dict[str, Callable[[pd.DataFrame], object]]
) -> pd.DataFrame:
    """A line for each cell of keys, in the order of their first rows."""
    lines = []
    for cell, rows in frame.groupby(keys, sort=False, dropna=False):
        named = dict(zip(keys, cell, strict=True))
        lines.append(named | {name: function(rows) for name, function in columns.items()})
    return pd.DataFrame(lines)


def _or_none(value: object) -> object:
    return None if value is None or value != value else value


# ---- circuits ------------------------------------------------------------------------------------


def ground_truth(ground_truth: pd.DataFrame) -> Table:
    rows = ground_truth[ground_truth["kind"] == AREA]
    searched = rows["exact_thresholds"].notna()
    frame = _by_cell(
        rows,
        ["circuit", "method", "format"],
        {
            "edge_auc": lambda r: spread(r["pessimistic_auc"]),
            "trapezoid": lambda r: spread(r["trapezoid_auc"]),
            "node_auc": lambda r: spread(r["node_auc"]),
            "exact": lambda r: _exact(r) if r["exact_thresholds"].notna().all() else None,
            "false": lambda r: _or_none(r["false_edges"].mean()),
            "missed": lambda r: _or_none(r["missed_edges"].mean()),
        },
    )
    lowest = rows[searched]
    counts = rows.drop_duplicates("circuit").set_index("circuit")
    sizes = "; ".join(
        f"{name} {int(row['true_edges'])} of {int(row['edges'])}" for name, row in counts.iterrows()
    )
    published = paper_numbers("pahq", "acdc_auc")
    published = published[published["metric"] == "L2"]
    return Table(
        title="Circuits that were built, found",
        caption=(
            "Area under the ROC curve of edges and of nodes (pessimistic: a staircase that rises"
            " only at circuits that were found), mean over seeds with its 95 % interval. Exact: at"
            " how many thresholds the circuit is the built one, edge for edge. False and missed"
            " edges at the smallest threshold. Zero ablation, squared distance of logits."
        ),
        frame=frame,
        columns={
            "circuit": "circuit",
            "method": "method",
            "format": "format",
            "edge_auc": "AUC, edges",
            "trapezoid": "trapezoid",
            "node_auc": "AUC, nodes",
            "exact": "exact",
            "false": Column("false edges", "{:.1f}"),
            "missed": Column("missed edges", "{:.1f}"),
        },
        notes=(
            f"True edges: {sizes}; {lowest['seed'].nunique()} seeds (rotation of the weights, and"
            " prompts).",
            "ACDC's repository gives (pessimistic, edges; zero ablation) "
            + "; ".join(
                f"{r['circuit']}: {r['method']} {r['edge_auc']:.3f}"
                for _, r in published[published["ablation"] == "zero"].iterrows()
            )
            + ".",
            "As released: all heads read head 0's input, unscaled e4m3.",
        ),
    )


def _exact(rows: pd.DataFrame) -> str:
    return f"{rows['exact_thresholds'].mean():.1f} of {int(rows['thresholds'].iloc[0])}"


def pairs(trained: pd.DataFrame, kind: str) -> pd.DataFrame:
    """RTN and PAHQ side by side: a row for each task, format and seed, of the paper's scope."""
    rows = trained[(trained["kind"] == kind) & trained["method"].isin([RTN, PAHQ])]
    if kind == EFFECTS:
        rows = rows[(rows["scope"] == "qkv") & (rows["scale"] == "head")]
        formats = rows.groupby("format")["seed"].nunique()
        rows = rows[rows["format"].isin(formats[formats == formats.max()].index)]
    keys = ["task", "format", "seed"]
    columns = [c for c in ("effect_error", "rank_correlation", "kl_nats") if c in rows]
    return rows.pivot_table(index=keys, columns="method", values=columns, sort=False)


def effects(trained: pd.DataFrame) -> Table:
    found = pairs(trained, EFFECTS)
    lines = []
    rows = trained[trained["kind"] == EFFECTS]
    for (task, form), group in found.groupby(level=["task", "format"], sort=False):
        error, rank = group["effect_error"], group["rank_correlation"]
        own = rows[(rows["task"] == task) & (rows["format"] == form)]
        own = own[(own["scope"] == "qkv") & (own["scale"] == "head")]
        other = own.groupby("method")["other_side"].mean()
        lines.append(
            {
                "task": task,
                "format": form,
                "rtn": small(error[RTN]),
                "pahq": small(error[PAHQ]),
                "ratio": spread(error[PAHQ] / error[RTN], 2),
                "rtn_rank": spread(rank[RTN]),
                "pahq_rank": spread(rank[PAHQ]),
                "sides": f"{other[RTN]:.1f} → {other[PAHQ]:.1f}",
                "deviation": small(own.groupby("seed")["effect_deviation"].first()),
                "floor": small(own.groupby("seed")["floor_nats"].first()),
            }
        )
    return Table(
        title="Effects of single edges in low precision",
        caption=(
            "Root mean square error of every edge's effect (nats of KL) against fp32 on the same"
            " model and prompts, and Spearman's correlation; mean over trained models with its 95 %"
            " interval. PAHQ keeps the head that owns the edge's receiver in full precision."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "task": "task",
            "format": "format",
            "rtn": "error, RTN",
            "pahq": "error, PAHQ",
            "ratio": "PAHQ / RTN",
            "rtn_rank": "rank, RTN",
            "pahq_rank": "rank, PAHQ",
            "sides": "wrong side of τ",
            "deviation": "deviation of effects",
            "floor": "floor, nats",
        },
        notes=(
            "Wrong side: edges whose effect is on the other side of the threshold than in fp32, RTN"
            " → PAHQ.",
            "Floor: KL of the whole graph in low precision to the model in full precision, before"
            " any edge is removed. A threshold below it means nothing.",
        ),
    )


def circuits(trained: pd.DataFrame) -> Table:
    rows = trained[trained["kind"] == CIRCUIT]
    frame = _by_cell(
        rows,
        ["task", "method", "format"],
        {
            "edges": lambda r: spread(r["edges"], 1),
            "kl": lambda r: spread(r["kl_nats"]),
            "accuracy": lambda r: spread(100 * r["task_accuracy"], 1),
            "jaccard": lambda r: spread(r["jaccard_share"]),
        },
    )
    return Table(
        title="Circuits of trained models",
        caption=(
            "Found by each precision at one threshold, judged in fp32 on held-out prompts: KL to"
            " the full model, accuracy at the task, edges shared with fp32's circuit (Jaccard)."
            " Mean over trained models with its 95 % interval."
        ),
        frame=frame,
        columns={
            "task": "task",
            "method": "method",
            "format": "format",
            "edges": "edges",
            "kl": "KL, nats",
            "accuracy": "accuracy, %",
            "jaccard": "agreement",
        },
    )


def ablation(trained: pd.DataFrame) -> Table:
    rows = trained[(trained["kind"] == EFFECTS) & (trained["seed"] == 0)]
    tasks = rows[rows["method"] == "PAHQ, sender"]["task"].unique()
    rows = rows[rows["task"].isin(tasks)]
    columns = {"effect_error": "error", "rank_correlation": "rank", "floor_nats": "floor"}
    frame = rows.sort_values(["task", "format", "scope", "scale"], kind="stable").rename(
        columns=columns
    )
    return Table(
        title="Who is high, what is low, and how weights are scaled",
        caption=(
            "Error of effects against fp32 on one trained model of each task (one seed: no"
            " interval)."
        ),
        frame=frame[["task", "format", "scope", "scale", "method", *columns.values()]],
        columns={
            "task": "task",
            "format": "format",
            "scope": "scope",
            "scale": "scale",
            "method": "method",
            "error": Column("error, nats", "{:.2e}"),
            "rank": Column("rank", "{:.3f}"),
            "floor": Column("floor, nats", "{:.2e}"),
        },
        notes=("Scale none: the public release's unscaled cast.",),
    )


def attribution(trained: pd.DataFrame) -> Table:
    found = pairs(trained, ATTRIBUTION)
    lines = []
    for (task, form), group in found.groupby(level=["task", "format"], sort=False):
        error, rank = group["effect_error"], group["rank_correlation"]
        lines.append(
            {
                "task": task,
                "format": form,
                "rtn": small(error[RTN]),
                "pahq": small(error[PAHQ]),
                "rtn_rank": spread(rank[RTN], 4),
                "pahq_rank": spread(rank[PAHQ], 4),
                "gain": spread(rank[PAHQ] - rank[RTN], 4),
            }
        )
    return Table(
        title="PAHQ inside EAP",
        caption=(
            "EAP's scores in low precision against fp32's. PAHQ here is ours to define: one"
            " backward pass for each head, which is high in it; so it costs as many passes as there"
            " are heads. Mean over trained models with its 95 % interval."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "task": "task",
            "format": "format",
            "rtn": "error, RTN",
            "pahq": "error, PAHQ",
            "rtn_rank": "rank, RTN",
            "pahq_rank": "rank, PAHQ",
            "gain": "gain in rank",
        },
    )


def pretrained(pretrained: pd.DataFrame) -> Table:
    optional = [
        c
        for c in ("format", "scope", "evaluations", "evaluation_seconds", "jaccard_share")
        if c in pretrained
    ]
    shown = {
        "format": "format",
        "scope": "scope",
        "evaluations": Column("evaluations", "{:.0f}"),
        "evaluation_seconds": "per evaluation",
        "jaccard_share": Column("agreement", "{:.3f}"),
    }
    return Table(
        title="Circuits of a pretrained model",
        caption=(
            "The strongest edges by EAP-IG, random ones, and the greedy search from some of"
            " EAP-IG's down. Judged in fp32 on held-out prompts: KL to the full model, accuracy at"
            " the task. Agreement: edges shared with fp32's circuit. Nobody knows this model's true"
            " circuits."
        ),
        frame=pretrained,
        columns={
            "task": "task",
            "method": "method",
            "edges": Column("edges", "{:,}"),
            "kl_nats": Column("KL, nats", "{:.3f}"),
            "task_accuracy": "accuracy",
            **{name: shown[name] for name in optional},
        },
        notes=("Seconds are of the processor, of a machine that did other work as well.",),
    )


# ---- cost ----------------------------------------------------------------------------------------


def times(rows: pd.DataFrame, variant: str) -> np.ndarray:
    """Of a variant, by round."""
    own = rows[rows["variant"] == variant].sort_values("repeat")
    return own["evaluation_seconds"].to_numpy(dtype=float)


def _ratio(found: Ratio) -> str:
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def speed(speed: pd.DataFrame) -> Table:
    rows = speed[speed["kind"] == "precision"]
    lines = [
        {
            "variant": variant,
            "seconds": float(np.median(times(rows, variant))),
            "speed": _ratio(ratio(times(rows, "fp32"), times(rows, variant))),
        }
        for variant in rows["variant"].unique()
    ]
    layer = speed[speed["kind"] == "layer"]
    share = ratio(layer["evaluation_seconds"], layer["full_seconds"])
    whole = speed[speed["kind"] == "whole"].set_index("variant")
    searches = "; ".join(
        f"{name} {human_seconds(row['search_seconds'])} for {int(row['evaluations']):,}"
        for name, row in whole.drop(index="agreement").iterrows()
    )
    gain = whole.loc[PLAIN, "search_seconds"] / whole.loc[FP32, "search_seconds"]
    return Table(
        title="One evaluation, by precision",
        caption=(
            f"Mean of receivers in three layers of {rows['model'].iloc[0]}, timed in turns; median"
            " of rounds, and the ratio to fp32 with its interval. RTN but where PAHQ is named."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "variant": "variant",
            "seconds": Column("an evaluation", human_seconds),
            "speed": "times as fast as fp32",
        },
        notes=(
            "GPT-2 small's shape, all edges present: an evaluation costs"
            f" {_ratio(share)} of a full patched forward, the mean over all edges.",
            f"A whole search on a small model takes, for so many evaluations: {searches}.",
            f"The engine in fp32 is {gain:.1f} times as fast as plain ACDC, and the two circuits"
            f" differ in {int(whole.loc['agreement', 'edges'])} edges.",
        ),
    )


def steps(speed: pd.DataFrame) -> Table:
    rows = speed[speed["kind"] == "step"].sort_values("place", kind="stable")
    names = list(rows["variant"].unique())
    lines = []
    for before, name in zip([None, *names], names, strict=False):
        own = times(rows, name)
        lines.append(
            {
                "variant": name,
                "seconds": float(np.median(own)),
                "step": None if before is None else _ratio(ratio(times(rows, before), own)),
                "saved": 1 - 1 / ratio(times(rows, names[0]), own).value,
            }
        )
    return Table(
        title="Where a saving of run time comes from",
        caption=(
            "One evaluation on GPT-2 small's shape (random weights), every line with all that is"
            " above it; the receiver stands in the layer of the mean edge. The step that is the"
            " paper's is the low precision of Q, K and V."
        ),
        frame=pd.DataFrame(lines),
        columns={
            "variant": "with",
            "seconds": Column("an evaluation", human_seconds),
            "step": "times as fast as the line above",
            "saved": Column("saved in all", lambda x: f"{100 * x:.1f} %"),
        },
    )


def totals(memory: pd.DataFrame) -> pd.DataFrame:
    """Rows with the bytes of all weights on the device, and with those of activations."""
    weights = memory["low_bytes"] + memory["full_bytes"] + memory["slice_bytes"]
    return memory.assign(weight_bytes=weights, device_bytes=weights + memory["activation_bytes"])


def memory(memory: pd.DataFrame) -> Table:
    rows = totals(memory)
    first = rows.groupby("shape")[["weight_bytes", "device_bytes"]].transform("first")
    rows = rows.assign(
        weights_saved=1 - rows["weight_bytes"] / first["weight_bytes"],
        all_saved=1 - rows["device_bytes"] / first["device_bytes"],
    )
    notes = [
        f"{name}: cached activations {human_bytes(own['activation_bytes'].iloc[0])} as counted,"
        f" {human_bytes(own['computed_bytes'].iloc[0])} as computed from the shapes."
        for name, own in rows.groupby("shape", sort=False)
    ]
    percent = "{:.1%}"
    return Table(
        title="Bytes on the device",
        caption=(
            "Weights of the layers and of the unembedding by format, full-precision slices of high"
            " heads by where the masters are, and all with the cached activations (which no policy"
            " changes). The first line of a shape is plain fp32."
        ),
        frame=rows,
        columns={
            "shape": "shape",
            "policy": "policy",
            "format": "format",
            "scope": "scope",
            "placement": "masters",
            "low_bytes": "low",
            "full_bytes": "fp32",
            "slice_bytes": "slices",
            "weights_saved": Column("weights saved", percent),
            "all_saved": Column("saved in all", percent),
        },
        notes=notes,
    )


def scheduler(scheduler: pd.DataFrame) -> Table:
    frame = _by_cell(
        scheduler,
        ["placement"],
        {
            "heads": lambda r: int(r["heads"].iloc[0]),
            "evaluations": lambda r: int(r["evaluations"].iloc[0]),
            "uploads": lambda r: int(r["uploads"].iloc[0]),
            "waits": lambda r: int(r["waits"].iloc[0]),
            "uploaded_bytes": lambda r: int(r["uploaded_bytes"].iloc[0]),
            "search_seconds": lambda r: float(r["search_seconds"].median()),
            "same": lambda r: bool(r["same_circuit"].all()),
        },
    )
    return Table(
        title="Bringing the head under test",
        caption=(
            "One search for each place of the full-precision masters. Waits: uploads that began"
            " only when they were needed. An upload serves all edges of a head."
        ),
        frame=frame,
        columns={
            "placement": "masters",
            "heads": "heads",
            "evaluations": Column("evaluations", "{:,}"),
            "uploads": "uploads",
            "waits": "waits",
            "uploaded_bytes": "uploaded",
            "search_seconds": "search",
            "same": "same circuit",
        },
    )
