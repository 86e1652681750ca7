"""PAHQ's claims, each bound to a check over measured rows."""

import numpy as np
import pandas as pd

from projects.pahq.labels import (
    AREA,
    ATTRIBUTION,
    CIRCUIT,
    EFFECTS,
    FP32,
    NONE,
    PAHQ,
    PLAIN,
    RANDOM,
    RELEASED,
    RTN,
)
from projects.pahq.tables import mean, pairs, times, totals
from shared.claims import Verdict, VerdictWord, claim
from shared.statistics import Mean, ratio
from shared.tables import human_bytes, paper_numbers

_HEADLINE = paper_numbers("pahq", "headline").set_index("quantity")["value"]
_TIME = _HEADLINE["run time saved (up to)"]
_MEMORY = _HEADLINE["memory saved (up to)"]
UNKNOWN = "paper value not available"
SEEDS = 5  # fewer give no interval worth the name


def _told(value: Mean, digits: int = 3) -> str:
    return f"{value.value:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}]"


def _word(full: bool, part: bool) -> VerdictWord:
    return "holds" if full else "partly" if part else "fails"


@claim(
    id="pahq.runtime",
    claim="Mixed precision makes ACDC much faster.",
    source="abstract",
    bound=(
        "PAHQ (Q, K and V in 8 bit, the head under test in full precision) saves at least 20 % of"
        " an evaluation of the same engine in fp32, with its interval; partly: saves anything"
    ),
    paper=f"up to {_TIME:.0%} less run time than unaccelerated ACDC",
    needs="the rows of pahq/speed",
)
def runtime(speed: pd.DataFrame) -> Verdict:
    rows = speed[speed["kind"] == "precision"]
    name = next((n for n in rows["variant"].unique() if n.startswith("PAHQ") and "qkv" in n), None)
    if name is None:
        return Verdict("not tested here", "no evaluation was timed with PAHQ")
    found = ratio(times(rows, name), times(rows, "fp32"))
    steps = speed[speed["kind"] == "step"].sort_values("place")
    names = list(steps["variant"].unique())
    fp32 = max((n for n in names if "int8" not in n), key=names.index)
    others = ratio(times(steps, fp32), times(steps, names[0]))
    measured = (
        f"{1 - found.value:+.1%} saved by precision (interval {1 - found.high:+.1%} to"
        f" {1 - found.low:+.1%}); by an engine that computes in fp32 what an edge reaches,"
        f" {1 - others.value:.1%} of plain ACDC's evaluation"
    )
    return Verdict(_word(1 - found.high >= 0.2, found.high < 1), measured)


@claim(
    id="pahq.memory",
    claim="Low-precision weights save memory.",
    source="abstract",
    bound=(
        "with the masters on the host, all bytes on the device (weights and cached activations) are"
        " at least 10 % fewer on every shape; partly: those of weights are"
    ),
    paper=f"up to {_MEMORY:.0%} less memory than unaccelerated ACDC",
    needs="the rows of pahq/memory",
)
def memory(memory: pd.DataFrame) -> Verdict:
    rows = totals(memory)
    saved, kept = [], []
    for name, own in rows.groupby("shape", sort=False):
        plain = own[own["policy"] == "fp32"].iloc[0]
        paper = own[(own["policy"] == "pahq-receiver") & (own["scope"] == "qkv")]
        host = paper[paper["placement"] == "prefetched"].iloc[0]
        resident = paper[paper["placement"] == "resident"].iloc[0]
        weights, everything, release = (
            1 - one[column] / plain[column]
            for one, column in (
                (host, "weight_bytes"),
                (host, "device_bytes"),
                (resident, "weight_bytes"),
            )
        )
        saved.append((weights, everything))
        kept.append(
            f"{name}: {weights:.1%} of the weights and {everything:.1%} of all bytes; with the"
            f" masters on the device, as the release has them, {release:+.1%} of the weights"
        )
    worst = np.min(saved, axis=0)
    return Verdict(_word(worst[1] >= 0.1, worst[0] >= 0.1), "; ".join(kept))


@claim(
    id="pahq.faithful",
    claim="Circuits found in mixed precision are as faithful as those of fp32.",
    source="abstract",
    bound=(
        "on every task the KL of PAHQ's circuit to the full model, less that of fp32's, has an"
        " interval that ends below a twentieth of what random edges lose more than fp32's, over at"
        f" least {SEEDS} models; partly: in most tasks"
    ),
    paper="faithfulness maintained (no number available)",
    needs=f"rows of pahq/trained with at least {SEEDS} seeds",
)
def faithful(trained: pd.DataFrame) -> Verdict:
    rows = trained[trained["kind"] == CIRCUIT]
    if rows["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} models of a task")
    kl = rows.pivot_table(index=["task", "seed"], columns="method", values="kl_nats", sort=False)
    good, told = {PAHQ: 0, RTN: 0}, []
    for task, own in kl.groupby(level="task", sort=False):
        null = float((own[RANDOM] - own[FP32]).mean())
        gaps = {method: mean(own[method] - own[FP32]) for method in (PAHQ, RTN)}
        for method, gap in gaps.items():
            good[method] += bool(null > 0 and gap.high < 0.05 * null)
        told.append(f"{task} {_told(gaps[PAHQ])} (random {null:+.2f})")
    tasks = len(told)
    measured = (
        f"{'; '.join(told)} nats; within the bound PAHQ in {good[PAHQ]} of {tasks} tasks, and"
        f" everything low (RTN) in {good[RTN]}"
    )
    return Verdict(_word(good[PAHQ] == tasks, 2 * good[PAHQ] > tasks), measured)


@claim(
    id="pahq.high_head",
    claim="Full precision for the head under test makes the effects of edges more exact.",
    source="abstract (the mechanism); RTN is the control without it",
    bound=(
        "error of effects smaller with PAHQ than with everything low in at least 7 of 8 cells of"
        f" task and format (mean over at least {SEEDS} models), and over all cells with its"
        " interval; partly: over all cells"
    ),
    paper=UNKNOWN,
    needs=f"rows of pahq/trained with at least {SEEDS} seeds",
)
def high_head(trained: pd.DataFrame) -> Verdict:
    found = pairs(trained, EFFECTS)
    if found.index.get_level_values("seed").nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} models of a task")
    logs = np.log(found["effect_error"][PAHQ] / found["effect_error"][RTN])
    cells = logs.groupby(level=["task", "format"], sort=False)
    won = int((cells.mean() < 0).sum())
    sure = sum(mean(values).high < 0 for _, values in cells)
    over_all = mean(logs.groupby(level="seed").mean())
    ranks = found["rank_correlation"][PAHQ] - found["rank_correlation"][RTN]
    rank = mean(ranks.groupby(level="seed").mean())
    measured = (
        f"smaller in {won} of {cells.ngroups} cells ({sure} with their interval); over all,"
        f" {np.exp(over_all.value):.3f} times the error of RTN [{np.exp(over_all.low):.3f},"
        f" {np.exp(over_all.high):.3f}]; rank correlation {_told(rank)}"
    )
    most = won >= 7 / 8 * cells.ngroups
    return Verdict(_word(most and over_all.high < 0, over_all.high < 0), measured)


@claim(
    id="pahq.ground_truth",
    claim="Mixed precision finds circuits as well as fp32 (area under the ROC curve).",
    source="table of AUC-ROC (skeleton in the public code)",
    bound=(
        "fp32 finds every built circuit exactly at some threshold, PAHQ's pessimistic AUC is within"
        " 0.02 of fp32's on every circuit and in every format, and random edges are not; partly: in"
        " 8 bit"
    ),
    paper="paper value not available (ACDC on compiled models: 1.000 by zero ablation)",
    needs="the rows of pahq/ground_truth",
)
def ground_truth(ground_truth: pd.DataFrame) -> Verdict:
    rows = ground_truth[ground_truth["kind"] == AREA]
    auc = rows.groupby(["circuit", "method", "format"], dropna=False)["pessimistic_auc"].mean()
    full = auc.xs(FP32, level="method").droplevel("format")
    exact = bool((rows.loc[rows["method"] == FP32, "exact_thresholds"] > 0).all())
    gaps = {
        form: float((full - own.droplevel("format")).abs().max())
        for form, own in auc.xs(PAHQ, level="method").groupby(level="format")
    }
    null = float((full - auc.xs(RANDOM, level="method").droplevel("format")).min())
    measured = (
        f"fp32 {'exact on all' if exact else 'not exact'}, AUC {full.min():.3f} or more; farthest"
        " from it PAHQ "
        + ", ".join(f"{gap:.3f} ({form})" for form, gap in gaps.items())
        + f"; random edges at least {null:.2f} below"
    )
    eight = max(gap for form, gap in gaps.items() if form != "int4") <= 0.02
    usable = exact and null > 0.02
    return Verdict(_word(usable and max(gaps.values()) <= 0.02, usable and eight), measured)


@claim(
    id="pahq.thresholds",
    claim=(
        "(Ours, not the paper's.) The high head matters at small thresholds: there PAHQ finds the"
        " built circuit where everything low keeps edges that do nothing."
    ),
    source="measured here",
    bound=(
        "over all circuits and formats, thresholds with the exact circuit: PAHQ more than RTN with"
        f" its interval over at least {SEEDS} seeds; partly: on average"
    ),
    needs=f"rows of pahq/ground_truth with at least {SEEDS} seeds",
)
def thresholds(ground_truth: pd.DataFrame) -> Verdict:
    rows = ground_truth[ground_truth["kind"] == AREA]
    if rows["seed"].nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} seeds")
    both = rows[rows["method"].isin([PAHQ, RTN])]
    table = both.pivot_table(
        index=["seed", "circuit", "format"], columns="method",
        values=["exact_thresholds", "false_edges"],
    )  # fmt: skip
    exact, false = table["exact_thresholds"], table["false_edges"]
    gain = mean((exact[PAHQ] - exact[RTN]).groupby(level="seed").mean())
    by_circuit = (exact[PAHQ] - exact[RTN]).groupby(level="circuit").mean()
    measured = (
        f"{_told(gain, 2)} thresholds of {int(rows['thresholds'].max())}, from"
        f" {', '.join(f'{name} {value:+.2f}' for name, value in by_circuit.items())}; false"
        f" edges at the smallest threshold {false[PAHQ].mean():.1f} (PAHQ),"
        f" {false[RTN].mean():.1f} (RTN)"
    )
    return Verdict(_word(gain.low > 0, gain.value > 0), measured)


@claim(
    id="pahq.release",
    claim=(
        "(Ours, not the paper's.) With head 0's input for all heads, as in the public release, no"
        " circuit with edges into other heads can be found."
    ),
    source="public code, read",
    bound=(
        "pessimistic AUC at least 0.2 below fp32's on every circuit with edges into the Q or K of"
        " heads other than 0; partly: on one"
    ),
    needs="the rows of pahq/ground_truth",
)
def release(ground_truth: pd.DataFrame) -> Verdict:
    rows = ground_truth[ground_truth["kind"] == AREA]
    auc = rows.groupby(["circuit", "method"])["pessimistic_auc"].mean().unstack("method")
    # the circuit `proportion` is built on head 0 of its layer
    others = auc[auc.index != "proportion"]
    lost = others[FP32] - others[RELEASED]
    measured = "; ".join(
        f"{name} {row[RELEASED]:.3f} (fp32 {row[FP32]:.3f})" for name, row in auc.iterrows()
    )
    return Verdict(_word(bool((lost >= 0.2).all()), bool((lost >= 0.2).any())), measured)


@claim(
    id="pahq.linear",
    claim=(
        "(Ours, not the paper's.) On a CPU low precision pays where it covers all linear layers,"
        " and not where it covers Q, K and V alone."
    ),
    source="measured here",
    bound=(
        "int8 in all linear layers at least twice as fast as fp32 and Q, K, V alone at most 1.15"
        " times, with their intervals; partly: all linear layers are faster with their interval"
    ),
    needs="the rows of pahq/speed on a CPU",
)
def linear(speed: pd.DataFrame) -> Verdict:
    rows = speed[speed["kind"] == "precision"]
    if not {"int8, linear", "int8, qkv"} <= set(rows["variant"]):
        return Verdict("not tested here", "int8 was not timed")
    every, some = (
        ratio(times(rows, "fp32"), times(rows, name)) for name in ("int8, linear", "int8, qkv")
    )
    measured = (
        f"all linear layers {every.value:.2f}x ({every.low:.2f} to {every.high:.2f}), Q, K, V alone"
        f" {some.value:.2f}x ({some.low:.2f} to {some.high:.2f})"
    )
    return Verdict(_word(every.low >= 2 and some.high <= 1.15, every.low > 1), measured)


@claim(
    id="pahq.engine",
    claim=(
        "(Ours, not the paper's.) Computing only what an edge reaches saves more than any precision"
        " does."
    ),
    source="measured here",
    bound=(
        "the mean evaluation at most 0.40 of a full patched forward, with all edges present, and a"
        " whole search at least 3 times as fast as plain ACDC with the same circuit (at most 1 % of"
        " edges apart); partly: one of the two"
    ),
    needs="the rows of pahq/speed",
)
def engine(speed: pd.DataFrame) -> Verdict:
    layer = speed[speed["kind"] == "layer"]
    share = ratio(layer["evaluation_seconds"], layer["full_seconds"])
    whole = speed[speed["kind"] == "whole"].set_index("variant")
    gain = whole.loc[PLAIN, "search_seconds"] / whole.loc[FP32, "search_seconds"]
    apart, edges = whole.loc["agreement", "edges"], whole.loc["agreement", "of_edges"]
    kept = whole.loc[PLAIN, "edges"]
    measured = (
        f"{share.value:.2f} of a full forward ({share.low:.2f} to {share.high:.2f}); a search"
        f" {gain:.1f}x as fast, {kept:.0f} of {edges:.0f} edges kept, {apart:.0f} apart"
    )
    fast = gain >= 3 and apart <= 0.01 * edges and 0 < kept < edges
    return Verdict(_word(share.high <= 0.4 and fast, share.high <= 0.4 or fast), measured)


@claim(
    id="pahq.activations",
    claim=(
        "(Ours, not the paper's.) Cached activations are what the shapes say, and outweigh what low"
        " precision of Q, K and V saves."
    ),
    source="derived here",
    bound="counted bytes within 5 % of the computed ones, and more than the bytes saved; partly: "
    "within 5 %",
    needs="the rows of pahq/memory",
)
def activations(memory: pd.DataFrame) -> Verdict:
    rows = totals(memory)
    apart = (rows["activation_bytes"] / rows["computed_bytes"] - 1).abs().max()
    plain = rows[rows["policy"] == "fp32"].set_index("shape")
    paper = rows[(rows["scope"] == "qkv") & (rows["placement"] == "prefetched")].set_index("shape")
    saved = plain["weight_bytes"] - paper["weight_bytes"]
    outweigh = bool((plain["activation_bytes"] > saved).all())
    measured = f"{apart:.1%} apart; " + "; ".join(
        f"{name}: {human_bytes(plain.loc[name, 'activation_bytes'])} cached,"
        f" {human_bytes(saved[name])} saved"
        for name in plain.index
    )
    return Verdict(_word(apart <= 0.05 and outweigh, apart <= 0.05), measured)


@claim(
    id="pahq.scheduler",
    claim="The full-precision slice is brought while other work goes on.",
    source="public code (the load stream)",
    bound=(
        "one upload for each head, all but the first before it is needed, and on a GPU a search"
        " with prefetching at most 2 % slower than one with resident masters; partly: the counts,"
        " without a GPU"
    ),
    paper=UNKNOWN,
    needs="the rows of pahq/scheduler on a GPU",
)
def scheduler(scheduler: pd.DataFrame) -> Verdict:
    rows = scheduler.groupby("placement").first()
    ahead, resident = rows.loc["prefetched"], rows.loc["resident"]
    counts = (
        bool(scheduler["same_circuit"].all())
        and ahead["uploads"] <= ahead["heads"]
        and ahead["waits"] <= 1
        and rows.loc["on demand", "waits"] == rows.loc["on demand", "uploads"]
    )
    measured = (
        f"{ahead['uploads']:.0f} uploads for {ahead['heads']:.0f} heads and"
        f" {ahead['evaluations']:.0f} evaluations, {ahead['waits']:.0f} of them waited for"
    )
    if scheduler["peak_bytes"].isna().all():
        return Verdict(_word(False, counts), measured + "; no GPU, so no time")
    seconds = scheduler.pivot(index="repeat", columns="placement", values="search_seconds")
    found = ratio(seconds["prefetched"], seconds["resident"])
    saved = resident["peak_bytes"] - ahead["peak_bytes"]
    measured += (
        f"; {found.value:.3f} of the time with resident masters, peak {human_bytes(saved)} lower"
    )
    return Verdict(_word(counts and found.value <= 1.02, counts), measured)


@claim(
    id="pahq.other_methods",
    claim="PAHQ can be put into other edge-based methods.",
    source="abstract",
    bound=(
        "EAP's ranking of edges nearer to fp32's with a high head than with everything low, in"
        f" every cell of task and format (mean over at least {SEEDS} models), and over all cells"
        " with its interval; partly: over all cells"
    ),
    paper=UNKNOWN,
    needs=f"rows of pahq/trained with at least {SEEDS} seeds",
)
def other_methods(trained: pd.DataFrame) -> Verdict:
    found = pairs(trained, ATTRIBUTION)
    if found.index.get_level_values("seed").nunique() < SEEDS:
        return Verdict("not tested here", f"fewer than {SEEDS} models of a task")
    rank = found["rank_correlation"]
    gains = rank[PAHQ] - rank[RTN]
    cells = gains.groupby(level=["task", "format"], sort=False).mean()
    over_all = mean(gains.groupby(level="seed").mean())
    measured = (
        f"nearer in {int((cells > 0).sum())} of {len(cells)} cells, rank correlation"
        f" {_told(over_all, 4)} over RTN's {rank[RTN].mean():.4f}, at one backward pass a head"
    )
    return Verdict(_word(bool((cells > 0).all()) and over_all.low > 0, over_all.low > 0), measured)


@claim(
    id="pahq.pretrained",
    claim="On a pretrained model the search in mixed precision finds what fp32 finds.",
    source="abstract",
    bound=(
        "from EAP-IG's edges, on every task: agreement with fp32's circuit at least 0.9, KL at most"
        " 5 % of that of no edges above fp32's, and random edges at least twice fp32's KL; partly:"
        " on most tasks. Tasks are the unit; fewer than 5 of them: partly at most"
    ),
    paper=UNKNOWN,
    needs="the rows of pahq/pretrained",
)
def pretrained(pretrained: pd.DataFrame) -> Verdict:
    good, told = {PAHQ: 0, RTN: 0}, []
    searched = pretrained.groupby("task", sort=False).filter(
        lambda own: (own["method"] == FP32).any()
    )
    for task, own in searched.groupby("task", sort=False):
        kl = own.groupby("method", sort=False)["kl_nats"]
        full, nothing, random = kl.last()[FP32], kl.last()[NONE], kl.min()[RANDOM]
        first = own[own["scope"] == "qkv"].set_index("method")
        for method in good:
            near = first.loc[method, "kl_nats"] - full <= 0.05 * nothing
            agree = first.loc[method, "jaccard_share"] >= 0.9
            good[method] += bool(near and agree and random >= 2 * full)
        told.append(
            f"{task}: {first.loc[PAHQ, 'jaccard_share']:.3f} (RTN"
            f" {first.loc[RTN, 'jaccard_share']:.3f}), KL {first.loc[PAHQ, 'kl_nats']:.2f} against"
            f" {full:.2f} (random edges {random:.2f}, none {nothing:.2f})"
        )
    tasks = len(told)
    measured = f"{'; '.join(told)}; within the bound PAHQ on {good[PAHQ]}, RTN on {good[RTN]}"
    every = good[PAHQ] == tasks and tasks >= SEEDS
    return Verdict(_word(every, 2 * good[PAHQ] > tasks), measured + f" of {tasks} searched")
