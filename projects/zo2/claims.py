"""ZO2's claims, each bound to a check over measured rows."""

import pandas as pd

from projects.zo2 import labels
from projects.zo2.labels import FULL, LIMITED, OVERLAPPED
from projects.zo2.tables import cost_of_offloading, gains, learnt_alike, timings
from shared.claims import Verdict, claim
from shared.tables import human_bytes, paper_numbers

_PAPER = paper_numbers("zo2", "memory")
_NVML = _PAPER[_PAPER["counter"] == "nvml, fp16"].set_index("model")["zo2_bytes"].to_dict()
_BARS = _PAPER[_PAPER["counter"] == "not stated"].set_index("model")
_SAVED = (1 - _BARS["zo2_bytes"] / _BARS["mezo_bytes"]).dropna()
ON_ONE_GPU = ("opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b")


@claim(
    id="zo2.bitwise",
    claim="Offloading changes nothing: losses, gradients and weights are those of plain MeZO.",
    source="abstract (no accuracy loss against standard zeroth-order methods)",
    bound=(
        "0 differing losses, gradients and parameter bits in every storage and overlap variant,"
        " over at least 30 steps"
    ),
    paper="no loss of accuracy",
    needs="rows of zo2/equality",
)
def bitwise(equality: pd.DataFrame) -> Verdict:
    equal = equality[equality["kind"] == labels.MUST_BE_EQUAL]
    wrong = int(
        (equal[["differing_losses", "differing_gradients", "differing_bits"]].sum(axis=1) > 0).sum()
    )
    bits, steps = int(equal["differing_bits"].sum()), int(equal["steps"].min())
    measured = (
        f"{bits} differing bits in {len(equal)} runs ({equal['model'].nunique()} models) of {steps}"
        f" steps; {wrong} runs differ"
    )
    return Verdict("fails" if wrong else "holds" if steps >= 30 else "partly", measured)


@claim(
    id="zo2.accuracy",
    claim="A model fine-tuned with ZO2 is as accurate as one fine-tuned with MeZO.",
    source="abstract; accuracy table",
    bound=(
        "equal accuracy and loss on held-out data, and equal weights, of models that have learnt:"
        " over at least 5 seeds the interval (95 %) of the loss below the untrained model's is"
        " above 0; partly: fewer seeds, or equal accuracy and loss with weights that differ"
    ),
    needs="rows of zo2/accuracy",
)
def accuracy(accuracy: pd.DataFrame) -> Verdict:
    ends = accuracy[accuracy["kind"] == "end"]
    ends = ends.drop_duplicates("method").set_index("method")  # those of the first seed
    found = gains(accuracy)
    if found is None or labels.MEZO not in ends.index:
        return Verdict("not tested here", "no run of MeZO, of ZO2, or of neither to compare with")
    mezo, zo2 = ends.loc[labels.MEZO], ends.loc[labels.ZO2]
    gained, seeds = found
    same = mezo["weights_sha256"] == zo2["weights_sha256"]
    close = mezo["test_accuracy"] == zo2["test_accuracy"] and mezo["test_loss"] == zo2["test_loss"]
    measured = (
        f"accuracy {mezo['test_accuracy']:.4f} and {zo2['test_accuracy']:.4f}, test loss"
        f" {mezo['test_loss']:.6f} and {zo2['test_loss']:.6f} after {int(zo2['step'])} steps"
        f"; weights {'identical' if same else 'different'}; loss {gained.value:.4f} below the"
        f" untrained model's ({gained.low:.4f} to {gained.high:.4f}, {seeds} seeds)"
    )
    return Verdict(learnt_alike(close, same, gained, seeds), measured)


@claim(
    id="zo2.flat_memory",
    claim="Device memory does not grow with the number of blocks.",
    source="memory table (GPU memory against model size)",
    bound=(
        "ZO2's peak within 3 % from the shallowest to the deepest model of a width, while MeZO's"
        " grows"
    ),
    needs="rows of zo2/memory for one width and several depths",
)
def flat_memory(memory: pd.DataFrame) -> Verdict:
    width, peaks = _by_depth(memory)
    if len(peaks) < 2:
        return Verdict("not tested here", "fewer than two depths of one width")
    spread = peaks["zo2-3"].max() / peaks["zo2-3"].min() - 1
    growth = peaks["mezo"].iloc[-1] / peaks["mezo"].iloc[0]
    measured = (
        f"{100 * spread:.4f} % from {peaks.index[0]} to {peaks.index[-1]} blocks of width {width};"
        f" MeZO {growth:.2f}x"
    )
    return Verdict("holds" if spread <= 0.03 and growth > 1.03 else "fails", measured)


@claim(
    id="zo2.saving",
    claim="ZO2 saves most of MeZO's device memory.",
    source="bar chart of the authors' project page",
    bound="more than half saved from 16 blocks on",
    paper=", ".join(f"{100 * share:.0f} % ({model})" for model, share in _SAVED.items()),
    needs="rows of zo2/memory with at least 16 blocks",
)
def saving(memory: pd.DataFrame) -> Verdict:
    width, peaks = _by_depth(memory)
    deep = peaks[peaks.index >= 16]
    if deep.empty:
        return Verdict(
            "not tested here", f"no model of 16 blocks or more; the deepest has {peaks.index.max()}"
        )
    saved, offloaded = 1 - deep["zo2-3"] / deep["mezo"], 1 - deep["zo2-3"] / deep["zo2-resident"]
    told = [
        f"{100 * saved[depth]:.1f} % at {depth} blocks ({100 * offloaded[depth]:.1f} % by"
        " offloading alone)"
        for depth in deep.index
    ]
    measured = f"{', '.join(told)}, width {width}"
    return Verdict(
        "holds" if (saved > 0.5).all() else "partly" if (saved > 0.5).any() else "fails", measured
    )


@claim(
    id="zo2.limit",
    claim="A model trains in memory that is too small for MeZO.",
    source="abstract; bar chart of the authors' project page (MeZO out of memory)",
    bound=(
        "under one limit MeZO ends with an allocation error and ZO2 finishes, with the loss of an"
        " unlimited MeZO"
    ),
    needs="rows of zo2/limit (the packaged SmolLM2-135M)",
)
def limit(limit: pd.DataFrame) -> Verdict:
    free = limit[limit["limit_bytes"].isna()].set_index("method")
    bound = limit[limit["limit_bytes"].notna()].set_index("method")
    size = human_bytes(float(bound["limit_bytes"].iloc[0]))
    told = "; ".join(
        f"{LIMITED[str(method)]} {'finishes' if row['finished'] else 'ends'}"
        for method, row in bound.iterrows()
    )
    measured = (
        f"under {size}: {told}; unlimited MeZO takes"
        f" {human_bytes(float(free.loc['mezo', 'peak_rss_bytes']))} of resident memory"
    )
    if not bound.loc["zo2", "finished"] or bound.loc["mezo", "finished"]:
        return Verdict("fails", measured)
    if not bound.loc["mezo", "out_of_memory"]:
        return Verdict(
            "not tested here", f"MeZO ended of something else: {bound.loc['mezo', 'outcome']}"
        )
    same = bound.loc["zo2", "last_loss"] == free.loc["mezo", "last_loss"]
    return Verdict(
        "holds" if same else "partly", measured + ("" if same else "; the losses differ")
    )


@claim(
    id="zo2.one_transfer",
    claim=(
        "Dual forward and deferred update bring the transfers down to one upload and one offload"
        " per block and step."
    ),
    source="method (dual forward, parameter update deferred to the next visit)",
    bound=(
        "exactly 1, 2 and 3 uploads and offloads per block and step with all, without the deferred"
        " update, and with three visits; bytes in proportion; no loss differs"
    ),
    paper="one upload and one offload",
    needs="rows of zo2/ablation",
)
def one_transfer(ablation: pd.DataFrame) -> Verdict:
    exact, told = True, []
    for tier, rows in ablation.groupby("tier", sort=False):
        unit = rows[rows["variant"] == FULL]["bytes_up"].iloc[0]
        visits = []
        for variant, times in {
            FULL: 1,
            labels.NO_DEFERRED_UPDATE: 2,
            labels.THREE_VISITS: 3,
        }.items():
            of_variant = rows[rows["variant"] == variant]
            counts = of_variant[["uploads", "offloads"]].div(of_variant["blocks"], axis=0)
            in_proportion = bool(
                (of_variant[["bytes_up", "bytes_down"]] == times * unit).all(axis=None)
            )
            exact = exact and bool((counts == times).all(axis=None)) and in_proportion
            visits.append(f"{counts.max(axis=None):g}")
        told.append(
            f"{tier} {', '.join(visits)} visits a block ({human_bytes(float(unit))} each way)"
        )
    losses = int(ablation["differing_losses"].sum())
    return Verdict(
        "holds" if exact and losses == 0 else "fails", f"{'; '.join(told)}; {losses} losses differ"
    )


@claim(
    id="zo2.no_extra_time",
    claim="Offloading costs almost no time.",
    source="abstract",
    bound=(
        "step time with overlapped offloading at most 1.10x the same step with all blocks on the"
        " device, from RAM, a warm and a cold disk, at 256 tokens or more"
    ),
    paper="almost no additional time",
    needs="rows of zo2/throughput on a CPU",
)
def no_extra_time(throughput: pd.DataFrame) -> Verdict:
    rows = throughput[(throughput["device"] == "cpu") & (throughput["tokens"] >= 256)]
    if rows.empty:
        return Verdict("not tested here", "no rows on a CPU with 256 tokens or more")
    groups = ["model", "tokens", "dtype"]
    # the worst of all models
    found = timings(rows, labels.ON_DEVICE, groups).groupby("variant")["time_ratio"].max()
    told = ", ".join(f"{name.removeprefix('ZO2, ')} {found[name]:.3f}x" for name in OVERLAPPED)
    against_mezo = (
        timings(rows, labels.MEZO, groups)
        .groupby("variant")["time_ratio"]
        .max()[labels.FROM_COLD_DISK]
    )
    passed = [found[name] <= 1.10 for name in OVERLAPPED]
    return Verdict(
        "holds" if all(passed) else "partly" if any(passed) else "fails",
        f"{told}; {against_mezo:.3f}x plain MeZO from a cold disk",
    )


@claim(
    id="zo2.overlap",
    claim="Moving blocks while computing is what hides the transfers.",
    source="method (dynamic scheduler)",
    bound=(
        "from a cold disk a step without overlap takes longer, its whole interval (95 % or more)"
        " above 1"
    ),
    needs="rows of zo2/ablation",
)
def overlap(ablation: pd.DataFrame) -> Verdict:
    return _slower(ablation, labels.SYNCHRONOUS)


@claim(
    id="zo2.deferred_update",
    claim="Deferring the update to the next visit saves time as well as transfers.",
    source="method (efficient parameter update)",
    bound=(
        "from a cold disk a step that flushes at once takes longer, its whole interval (95 % or"
        " more) above 1"
    ),
    needs="rows of zo2/ablation",
)
def deferred_update(ablation: pd.DataFrame) -> Verdict:
    return _slower(ablation, labels.NO_DEFERRED_UPDATE)


@claim(
    id="zo2.reused_memory",
    claim="Reusing device memory is faster than allocating it at every visit.",
    source="method (reusable memory)",
    bound=(
        "a step that allocates a buffer per visit takes longer, its whole interval (95 % or more)"
        " above 1; never more than 3 buffers otherwise"
    ),
    needs="rows of zo2/ablation",
)
def reused_memory(ablation: pd.DataFrame) -> Verdict:
    verdict = _slower(ablation, labels.NO_REUSED_SLOTS)
    buffers = int(ablation["buffers"].max())
    return Verdict(
        "fails" if buffers > 3 else verdict.verdict,
        f"{verdict.measured}; at most {buffers} buffers with reuse",
    )


@claim(
    id="zo2.lowbit",
    claim="Storing and moving the blocks in fewer bits cuts the transfers and keeps the training.",
    source="abstract (low-bit precision to lower the data exchange)",
    bound=(
        "bytes in proportion to the bits, and an update that survives storage with a cosine of at"
        " least 0.9, for 16 and for 8 bits"
    ),
    needs="rows of zo2/lowbit",
)
def lowbit(lowbit: pd.DataFrame) -> Verdict:
    nearest = lowbit[lowbit["rounding"] == "nearest"].set_index("storage_dtype")
    full = nearest.loc["float32", "offloaded_bytes"]
    bits = {"bfloat16": 16, "float16": 16, "float8_e5m2": 8, "float8_e4m3": 8}
    cosine = nearest["update_cosine"].fillna(0.0)
    proportional = all(
        abs(nearest.loc[name, "offloaded_bytes"] / full - width / 32) < 0.01
        for name, width in bits.items()
    )
    kept = {name: cosine[name] >= 0.9 for name in bits}
    told = ", ".join(f"{name} {cosine[name]:.3f}" for name in bits)
    measured = (
        f"cosine of what survives: {told}; bytes {'in' if proportional else 'out of'} proportion"
    )
    sixteen = all(kept[name] for name, width in bits.items() if width == 16)
    return Verdict(
        "fails" if not (proportional and sixteen) else "holds" if all(kept.values()) else "partly",
        measured,
    )


@claim(
    id="zo2.tokens",
    claim="The more tokens a step has, the less offloading costs.",
    source=(
        "throughput condition (transfers hide behind compute); sensitivity to batch and sequence"
    ),
    bound=(
        "with overlap, the cost at the most tokens is at most 1.05x, and its interval (95 %) below"
        " that at the fewest; partly: it is higher, or the intervals overlap"
    ),
    needs="rows of zo2/sensitivity",
)
def tokens(sensitivity: pd.DataFrame) -> Verdict:
    found = cost_of_offloading(sensitivity)
    few, many = found.iloc[0], found.iloc[-1]
    measured = (
        f"{few['overlap_ratio']:.3f}x ({few['interval']}) at {int(few['tokens'])} tokens,"
        f" {many['overlap_ratio']:.3f}x ({many['interval']}) at {int(many['tokens'])}"
    )
    falls = many["overlap_high_ratio"] < few["overlap_low_ratio"]
    rises = many["overlap_low_ratio"] > few["overlap_high_ratio"]
    if rises:
        return Verdict("fails", measured)
    return Verdict("holds" if falls and many["overlap_ratio"] <= 1.05 else "partly", measured)


@claim(
    id="zo2.opt175b",
    claim="The largest model, OPT-175B, is fine-tuned in the memory of one GPU.",
    source="abstract; memory table of the public code",
    bound=(
        "at most 5 % above the paper's value, by the driver's counter, in float16, batch 1, 2048"
        " tokens"
    ),
    paper=human_bytes(_NVML["opt-175b"]),
    needs="scale paper: a GPU, and host memory for the whole model",
)
def opt175b(memory: pd.DataFrame) -> Verdict:
    return _published(memory, ["opt-175b"])


@claim(
    id="zo2.gpu_memory",
    claim="OPT-1.3B to OPT-30B take a few gigabytes of GPU memory.",
    source="memory table of the public code",
    bound=(
        "at most 5 % above the published values, by the driver's counter, in float16, batch 1, 2048"
        " tokens"
    ),
    paper=", ".join(f"{human_bytes(_NVML[model])} ({model})" for model in ON_ONE_GPU),
    needs="scale gpu: a GPU, and host memory for the models",
)
def gpu_memory(memory: pd.DataFrame) -> Verdict:
    return _published(memory, list(ON_ONE_GPU))


@claim(
    id="zo2.gpu_throughput",
    claim="On a GPU, offloading to host memory costs almost no throughput.",
    source="abstract; throughput table (numbers not available)",
    bound=(
        "step time from host memory at most 1.10x that with all blocks on the GPU, for every size"
    ),
    needs="scale gpu: a GPU",
)
def gpu_throughput(throughput: pd.DataFrame) -> Verdict:
    rows = throughput[throughput["device"] == "cuda"]
    if rows.empty:
        return Verdict("not tested here", "no rows from a GPU")
    found = timings(rows, labels.ON_DEVICE, ["model", "tokens", "dtype"])
    ratios = found[found["variant"] == labels.FROM_RAM].groupby("model")["time_ratio"].max()
    passed = ratios <= 1.10
    told = ", ".join(f"{model} {value:.3f}x" for model, value in ratios.items())
    return Verdict("holds" if passed.all() else "partly" if passed.any() else "fails", told)


def _by_depth(memory: pd.DataFrame) -> tuple[int, pd.DataFrame]:
    """The width with the most depths, and peaks by depth and method."""
    rows = memory[memory["peak_bytes"].notna()]
    width = int(rows.groupby("hidden")["layers"].nunique().idxmax())
    peaks = rows[rows["hidden"] == width].pivot_table(
        index="layers", columns="method", values="peak_bytes", aggfunc="max"
    )
    return width, peaks.dropna(subset=["mezo", "zo2-3"]).sort_index()


def _slower(ablation: pd.DataFrame, variant: str) -> Verdict:
    """Whether a step from a cold disk takes longer with `variant` than with all of ZO2."""
    found = (
        timings(ablation[ablation["tier"] == labels.ON_DISK], FULL, ["tier"])
        .set_index("variant")
        .loc[variant]
    )
    low, middle, high = (float(found[f"time_{bound}ratio"]) for bound in ("low_", "", "high_"))
    sure = low > 1 and found["coverage_probability"] >= 0.95
    return Verdict(
        "holds" if sure else "partly" if middle > 1 else "fails",
        f"{middle:.3f}x ({low:.3f} to {high:.3f})",
    )


def _published(memory: pd.DataFrame, models: list[str]) -> Verdict:
    rows = memory[
        (memory["counter"] == "nvml") & (memory["method"] == "zo2-3") & memory["model"].isin(models)
    ]
    found = rows.set_index("model")["peak_bytes"]
    if found.empty:
        return Verdict("not tested here", "no rows of these models from a GPU")
    passed = [bool(found[model] <= 1.05 * _NVML[model]) for model in found.index]
    told = ", ".join(f"{model} {human_bytes(float(found[model]))}" for model in found.index)
    whole = all(passed) and len(found) == len(models)
    return Verdict("holds" if whole else "partly" if any(passed) else "fails", told)
