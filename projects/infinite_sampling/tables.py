"""Infinite Sampling's tables: rows in, `Table` out."""

import pandas as pd

from projects.infinite_sampling import labels
from shared.statistics import ratio
from shared.tables import Column, Table, paper_numbers

SHARING = (
    "The prompt is read once for its whole group. Fixed slots hold a copy of its keys and values"
    " each; dynamic slots share its whole pages."
)
RATES = (
    "Tokens per second and ratios: medians over rounds in which every method decoded all prompts in"
    " turn; process time of one thread on a CPU, wall time on a GPU."
)


def memory(memory: pd.DataFrame) -> Table:
    modes = memory[memory["kind"] == "modes"].copy()
    full = modes[modes["mode"] == labels.FULL].iloc[0]
    modes["kv_share"] = modes["kv_bytes"] / full["kv_bytes"]
    modes["peak_share"] = modes["peak_bytes"] / full["peak_bytes"]
    modes["total_bytes"] = modes["peak_bytes"] + modes["weight_bytes"]
    modes["total_share"] = modes["total_bytes"] / (full["peak_bytes"] + full["weight_bytes"])
    return Table(
        title="Peak memory by decode mode",
        caption=(
            f"{full['model']}, a group of {full['group']}, {full['prompt_tokens']} prompt and"
            f" {full['max_new_tokens']} new tokens."
        ),
        frame=modes,
        columns={
            "mode": "mode",
            "slots": "rows",
            "prompt": "prompt's keys and values",
            "kv_bytes": "keys and values",
            "kv_share": "of full group",
            "peak_bytes": "peak beyond weights",
            "peak_share": "of full group",
            "total_bytes": "with weights",
            "total_share": "of full group",
        },
        paper=paper_numbers("infinite_sampling", "memory"),
        notes=[
            SHARING,
            (
                "Peaks are all that the allocator handed out, logits and their float64 copies"
                " included. The cache of `generate` concatenates."
            ),
            (
                "The full framework feeds the prefixes of completions again where it takes them up,"
                " so that it keeps none of their keys and values; one layer's cache is there twice"
                " meanwhile: little of thirty layers, much of two (the figure's policy)."
            ),
        ],
    )


def speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Per schedule: mean steps over prompts, against the lower bound and micro groups; occupancy;
    tokens per second.
    """
    rollouts, timed = frame[frame["kind"] == "rollout"], frame[frame["kind"] == "time"]
    base = rollouts[rollouts["schedule"] == labels.MICRO].set_index("prompt")["steps"]
    micro = timed[timed["schedule"] == labels.MICRO]
    lines = []
    for name in dict.fromkeys([*rollouts["schedule"], *timed["schedule"]]):
        own, times = rollouts[rollouts["schedule"] == name], timed[timed["schedule"] == name]
        speed = None
        if len(times) == len(micro) and len(times):
            # Seconds a token against seconds a token: the same completions take the same tokens,
            # those of peers others.
            speed = ratio(
                times["tokens_per_second"].to_numpy(), micro["tokens_per_second"].to_numpy()
            )
        steps = own.set_index("prompt")["steps"]
        lines.append(
            {
                "model": frame["model"].iloc[0],
                "schedule": name,
                "mean_steps": float(steps.mean()) if len(own) else None,
                "deviation_steps": float(steps.std()) if len(own) > 1 else None,
                "bound_ratio": (
                    float((own["steps"] / own["lower_bound"]).mean()) if len(own) else None
                ),
                "micro_ratio": float((steps / base).mean()) if len(own) else None,
                "occupancy_share": float(own["occupancy_share"].mean()) if len(own) else None,
                "reingests_count": float(own["reingests"].mean()) if len(own) else None,
                "kv_bytes": float(own["kv_bytes"].mean()) if len(own) else None,
                "tokens_per_second": (
                    float(times["tokens_per_second"].median()) if len(times) else None
                ),
                "speed_ratio": speed.value if speed else None,
                "low_ratio": speed.low if speed else None,
                "high_ratio": speed.high if speed else None,
            }
        )
    return pd.DataFrame(lines)


def throughput(schedule: pd.DataFrame, pretrained: pd.DataFrame) -> Table:
    found = pd.concat([speeds(schedule), speeds(pretrained)], ignore_index=True)
    found["interval"] = [
        f"{low:.2f} to {high:.2f}" if low == low else "–"
        for low, high in found[["low_ratio", "high_ratio"]].to_numpy(float)
    ]
    rows = schedule[schedule["kind"] == "rollout"]
    bound = rows.groupby("prompt")["lower_bound"].first()
    others = pretrained[pretrained["kind"] == "rollout"].groupby("prompt")["lower_bound"].first()
    return Table(
        title="Decoding steps and throughput by schedule",
        caption=(
            f"Groups of {schedule['group'].iloc[0]} in {schedule['slots'].iloc[0]} slots for"
            f" {len(bound)} prompts of the policy, one prompt at a time (lower bound:"
            f" {bound.mean():.1f} steps); {pretrained['group'].iloc[0]} in"
            f" {pretrained['slots'].iloc[0]} for {len(others)} prompts of the other model (lower"
            f" bound: {others.mean():.1f})."
        ),
        frame=found,
        columns={
            "model": "model",
            "schedule": "schedule",
            "mean_steps": Column("steps", "{:.1f}"),
            "deviation_steps": Column("± over prompts", "{:.1f}"),
            "bound_ratio": Column("of lower bound", "{:.2f}"),
            "micro_ratio": Column("of micro groups", "{:.2f}"),
            "occupancy_share": "slots busy",
            "reingests_count": Column("re-ingestions", "{:.1f}"),
            "kv_bytes": "keys and values",
            "tokens_per_second": "tokens/s",
            "speed_ratio": Column("to micro groups", "{:.2f}x"),
            "interval": "interval",
        },
        paper=paper_numbers("infinite_sampling", "throughput"),
        notes=[
            RATES,
            (
                "Every schedule of the policy was decoded live, and those with fixed slots took the"
                " steps of their replay. Dynamic slots, more rows in the same memory, are the"
                " default of the library and of the command."
                " Of the other model, those with a rate were for the first prompt; the rest is"
                " replayed from measured lengths."
            ),
            (
                "Shortest first takes, by a theorem, exactly the steps of micro groups sorted by"
                " length: in ascending order a completion starts when the one m places before it"
                " ends, so that one slot decodes the longest of each sorted group, one after"
                " another."
            ),
            (
                "A step is one forward of all slots; the full group's steps have more rows and are"
                " not to be compared. Re-ingestions are forwards beside the steps; tokens per"
                " second hold them, the prompts' forwards, predictions and plans."
            ),
            (
                "The interval holds the true median with a probability of at least 95 % where there"
                " are six rounds; else it spans them all."
            ),
        ],
    )


def prediction(prediction: pd.DataFrame) -> Table:
    return Table(
        title="Length prediction by the number of tokens seen",
        caption=(
            "Prompts of the test are not those of the fit. Kendall's tau-b; within a group, ties of"
            " a prediction count as no order."
        ),
        frame=prediction,
        columns={
            "prefix": "k",
            "predictor": "predictor",
            "tested_on": "unfinished",
            "remaining_error_tokens": Column("error, remaining", "{:.2f}"),
            "total_error_tokens": Column("error, total, all", "{:.2f}"),
            "smape_ratio": Column("SMAPE", "{:.3f}"),
            "within_5_share": "within 5",
            "within_10_share": "within 10",
            "pooled_tau_ratio": Column("tau, pooled", "{:.3f}"),
            "group_tau_ratio": Column("tau, within groups", "{:.3f}"),
        },
        notes=[
            "Errors in tokens. Those of what remains are over completions longer than k, a"
            " population that changes with k; those of the total are over all, with no error for"
            " those that have ended."
        ],
    )


def ablation_steps(ablation: pd.DataFrame) -> pd.DataFrame:
    """Mean of steps / lower bound by what is known of lengths (rows) and refill (columns)."""
    steps = ablation[ablation["kind"] == "steps"].copy()
    steps["bound_ratio"] = steps["steps"] / steps["lower_bound"]
    found = steps.pivot_table(
        index="lengths", columns="refill", values="bound_ratio", aggfunc="mean", sort=False
    )
    order = [
        "none",
        *sorted((n for n in found.index if n.startswith("k =")), key=lambda n: int(n[4:])),
        "oracle",
    ]
    return found.reindex([name for name in order if name in found.index])


def ablation(ablation: pd.DataFrame) -> Table:
    found = ablation_steps(ablation).reset_index()
    plans = ablation[ablation["kind"] == "plan"]
    notes = [
        "Replayed from measured lengths. `plan_sjf` is the paper's; with k tokens seen, their steps"
        " are counted."
    ]
    for (slots, eps), rows in plans.groupby(["slots", "eps_ratio"]):
        statuses = ", ".join(
            f"{count} {status}" for status, count in rows["status"].value_counts().items()
        )
        notes.append(
            f"plan for {slots:g} slots, eps {eps:g}:"
            f" {(rows['steps'] / rows['lower_bound']).mean():.3f} of the lower bound, certified"
            f" {rows['certificate_ratio'].mean():.3f}, median"
            f" {1e3 * rows['plan_seconds'].median():.2g} ms ({statuses})"
        )
    columns = {"lengths": "lengths known"} | {
        name: Column(name.replace("_", " "), "{:.3f}")
        for name in found.columns
        if name != "lengths"
    }
    return Table(
        title="Schedulers and predictions",
        caption="Decoding steps over the lower bound, the mean over prompts.",
        frame=found,
        columns=columns,
        notes=notes,
    )


def exactness(exactness: pd.DataFrame) -> Table:
    found = exactness[exactness["kind"] == "completions"].copy()
    found["format"] = [
        f"{d}, fixed shapes" if fixed else d
        for d, fixed in zip(found["dtype"], found["fixed_shape"].astype(bool), strict=True)
    ]
    gradients = exactness[exactness["kind"] == "gradient"]
    notes = [
        f"Gradient in micro batches of {micro:g} against the whole, {dtype}, {loss}: relative"
        f" difference {rows['relative_difference_ratio'].max():.1e}"
        for (dtype, loss, micro), rows in gradients.groupby(["dtype", "loss_type", "micro_batch"])
    ]
    notes += [
        f"With advantages over micro batches of {row['micro_batch']:g} alone, {row['dtype']}:"
        f" relative difference {row['relative_difference_ratio']:.1e}"
        for _, row in exactness[exactness["kind"] == "own advantages"].iterrows()
    ]
    return Table(
        title="Completions by schedule",
        caption=(
            "Against those of the full group (fixed shapes: of micro groups), token by token; and"
            " drawn again by a forward without a cache. Another seed: what they have in common by"
            " chance."
        ),
        frame=found,
        columns={
            "format": "number format",
            "schedule": "schedule",
            "completions": "completions",
            "same": Column("identical", "{:.0f}"),
            "redrawn": Column("drawn again", "{:.0f}"),
            "logprob_difference_ratio": Column("largest difference of a log-probability", "{:.1e}"),
            "preemptions": Column("preemptions", "{:.0f}"),
            "reingests": Column("re-ingestions", "{:.0f}"),
        },
        notes=notes,
    )


def theorems(theorems: pd.DataFrame) -> Table:
    return Table(
        title="Theorems of schedules on random instances",
        caption="Synthetic durations. Optima are found by trying all assignments.",
        frame=theorems,
        columns={
            "theorem": "theorem",
            "instances": Column("instances", "{:,.0f}"),
            "violations": Column("violations", "{:.0f}"),
            "plans": Column("plans", "{:.0f}"),
        },
    )


def trained(training: pd.DataFrame) -> pd.DataFrame:
    """Per number format and mode: times of a step, their ratios to micro groups' and to TRL's step
    by step, bytes, rewards.
    """
    steps, ends, peaks = (
        training[training["kind"] == kind] for kind in ("step", "evaluation", "memory")
    )
    lines = []
    for (dtype, mode), rows in steps.groupby(["dtype", "mode"], sort=False):
        own = ends[(ends["dtype"] == dtype) & (ends["mode"] == mode)].pivot_table(
            index="prompts", columns="step", values="reward_score"
        )
        peak = peaks[(peaks["dtype"] == dtype) & (peaks["mode"] == mode)].iloc[0]

        bases = {
            other: steps[(steps["dtype"] == dtype) & (steps["mode"] == other)]
            for other in (labels.MICRO, labels.TRL)
        }
        paired = {other for other, base in bases.items() if len(base) == len(rows)}
        lines.append(
            {
                "dtype": dtype,
                "mode": mode,
                # which draws its own
                "same_rewards": (
                    f"{int(rows['same_rewards'].sum())} of {len(rows)}"
                    if mode != labels.TRL
                    else None
                ),
                "same": int(rows["same_rewards"].sum()),
                "made": len(rows),
                "pool": f"{own.loc['pool'].iloc[0]:.2f} to {own.loc['pool'].iloc[-1]:.2f}",
                "held_out": (
                    f"{own.loc['held out'].iloc[0]:.2f} to {own.loc['held out'].iloc[-1]:.2f}"
                ),
                "kv_bytes": float(rows["kv_bytes"].mean()),
                "decoding_steps": float(rows["steps"].mean()),
                "rollout_seconds": float(rows["rollout_seconds"].median()),
                "rollout_ratio": (
                    ratio(bases[labels.MICRO]["rollout_seconds"], rows["rollout_seconds"]).value
                    if labels.MICRO in paired
                    else None
                ),
                "step_seconds": float(rows["step_seconds"].median()),
                "trl_ratio": (
                    ratio(rows["step_seconds"], bases[labels.TRL]["step_seconds"]).value
                    if labels.TRL in paired
                    else None
                ),
                "rollout_peak_bytes": peak["rollout_peak_bytes"],
                "step_peak_bytes": peak["step_peak_bytes"],
                "mismatch_ratio": float(rows["mismatch_ratio"].max()),
            }
        )
    return pd.DataFrame(lines)


def training(training: pd.DataFrame) -> Table:
    steps = training[training["kind"] == "step"]
    drift = (
        steps[steps["frozen_error_tokens"].notna()]
        if "frozen_error_tokens" in steps
        else steps.iloc[:0]
    )
    notes = [
        (
            "All take each step in turn, from the same weights, on the same prompts, with the same"
            " loss, optimizer and rate. Rewards: the mean over 16 samples of each prompt. TRL, with"
            " its own rollout, draws other completions."
        ),
        (
            "Times: medians over steps, process time of one thread on a CPU. A step is all of it:"
            " rollout, rewards, the update, the refit of the predictor (under TRL part of the"
            " rollout)."
        ),
        (
            "Peaks: of all that the allocator handed out in one more step. The full group's"
            " backward is of all completions at once, that of the others of as many as there are"
            " slots. TRL's backward holds a tile of 32,768 logits a token whatever the vocabulary,"
            " which is much for one of 18 and little for one of 150,000: only rollouts are to be"
            " compared with TRL's."
        ),
    ]
    for dtype, rows in drift.groupby("dtype"):
        rows = rows[rows["mode"] == labels.TRAINED_FRAMEWORK]
        late = rows[rows["step"] >= rows["step"].max() / 2]
        notes.append(
            f"{dtype}, second half: mean error of the predictor fitted online"
            f" {late['online_error_tokens'].mean():.2f} tokens, of one fitted at the first step"
            f" {late['frozen_error_tokens'].mean():.2f}; mean length from"
            f" {rows['length_tokens'].iloc[:4].mean():.1f} to"
            f" {rows['length_tokens'].iloc[-4:].mean():.1f}"
        )
    return Table(
        title="GRPO with each rollout, and TRL's trainer",
        caption=(
            "Rewards per step must be those of the full group wherever completions are this"
            " engine's; what differs is memory and time."
        ),
        frame=trained(training),
        columns={
            "dtype": "number format",
            "mode": "rollout",
            "same_rewards": "steps with equal rewards",
            "pool": "reward, training pool",
            "held_out": "reward, held out",
            "kv_bytes": "keys and values",
            "decoding_steps": Column("decoding steps", "{:.1f}"),
            "rollout_seconds": "rollout",
            "rollout_ratio": Column("to micro groups", "{:.2f}x"),
            "step_seconds": "step",
            "trl_ratio": Column("of TRL's", "{:.2f}"),
            "rollout_peak_bytes": "peak of the rollout",
            "step_peak_bytes": "peak of the step",
            "mismatch_ratio": Column("log-probability, sampled to trained", "{:.1e}"),
        },
        notes=notes,
    )
