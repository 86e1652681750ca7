"""Infinite Sampling's claims, each bound to a check over measured rows."""

import pandas as pd

from projects.infinite_sampling import labels
from projects.infinite_sampling.tables import speeds, trained
from shared.claims import Verdict, claim
from shared.statistics import mean_interval
from shared.tables import human_bytes, paper_numbers

_HEADLINE = paper_numbers("infinite_sampling", "headline").set_index("quantity")["value"]
_SAVED = _HEADLINE["peak memory saved by micro groups (over)"]
_FASTER = _HEADLINE["throughput over micro groups (more than)"]
_STEPS = _HEADLINE["decoding steps saved over micro groups (up to)"]


@claim(
    id="infinite_sampling.memory",
    claim="Micro sampling groups take less than half the memory of decoding the whole group.",
    source="abstract; memory table",
    bound=(
        "keys and values of micro groups with a quarter of the group in slots at most 50 % of the"
        " full group's; the peak beyond the weights too"
    ),
    paper=f"-{_SAVED:.0%} of the peak with weights, Qwen3-1.7B (21.55 to 10.64 GB)",
    needs="rows of infinite_sampling/memory",
)
def memory(memory: pd.DataFrame) -> Verdict:
    rows = memory[memory["kind"] == "modes"].set_index("mode")
    full, micro = rows.loc[labels.FULL], rows.loc[labels.MICRO]
    kv, peak = micro["kv_bytes"] / full["kv_bytes"], micro["peak_bytes"] / full["peak_bytes"]
    total = (micro["peak_bytes"] + micro["weight_bytes"]) / (
        full["peak_bytes"] + full["weight_bytes"]
    )
    measured = (
        f"{human_bytes(micro['kv_bytes'])} of keys and values against"
        f" {human_bytes(full['kv_bytes'])} ({kv:.0%}); peak beyond weights {peak:.0%}, with weights"
        f" {total:.0%}; {full['model']}, group {full['group']}, {micro['slots']} slots"
    )
    return Verdict("fails" if kv > 0.5 else "holds" if peak <= 0.5 else "partly", measured)


@claim(
    id="infinite_sampling.equal_memory",
    claim="Continuous sampling and the full framework take the memory of micro groups.",
    source="abstract; evolution figure (at constant memory)",
    bound=(
        "keys and values of micro groups, of continuous sampling with fixed slots and of the full"
        " framework within 1 % of one another, and equal to the formula c (m (prompt + new) +"
        " prompt)"
    ),
    paper="the same memory",
    needs="rows of infinite_sampling/memory",
)
def equal_memory(memory: pd.DataFrame) -> Verdict:
    rows = (
        memory[memory["kind"] == "modes"]
        .set_index("mode")
        .loc[[labels.MICRO, labels.FIXED_SLOTS, labels.FULL_FRAMEWORK]]
    )
    spread = rows["kv_bytes"].max() / rows["kv_bytes"].min() - 1
    formula = (rows["kv_bytes"] / rows["formula_bytes"] - 1).abs().max()
    peaks = rows["peak_bytes"] / rows.loc[labels.MICRO, "peak_bytes"]
    measured = (
        f"keys and values {spread:.1%} apart, {formula:.1%} from the formula; peak of the framework"
        f" {peaks['full framework']:.2f} of micro groups'"
    )
    return Verdict("fails" if spread > 0.01 else "holds" if formula == 0 else "partly", measured)


@claim(
    id="infinite_sampling.group_size",
    claim="Memory does not grow with the group.",
    source="abstract (group size decoupled from memory)",
    bound=(
        "with fixed slots the peak beyond the weights grows by at most 5 % over the groups that do"
        " not fit into the slots; the full group's at least by half of what the group grows"
    ),
    needs="rows of infinite_sampling/memory",
)
def group_size(memory: pd.DataFrame) -> Verdict:
    rows = memory[memory["kind"] == "groups"]
    growth = {}
    for mode, own in rows.groupby("mode"):
        own = own[own["group"] > rows.loc[rows["mode"] == labels.MICRO, "slots"].max()].sort_values(
            "group"
        )
        growth[mode] = own["peak_bytes"].iloc[-1] / own["peak_bytes"].iloc[0]
        groups = own["group"].iloc[0], own["group"].iloc[-1]
    fixed = max(growth[labels.MICRO], growth[labels.FULL_FRAMEWORK])
    measured = (
        f"group {groups[0]} to {groups[1]}: peak x {fixed:.3f} with fixed slots, x"
        f" {growth['full group']:.1f} with the full group"
    )
    if fixed > 1.05:
        return Verdict("fails", measured)
    return Verdict(
        "holds" if growth[labels.FULL] >= groups[1] / groups[0] / 2 else "partly", measured
    )


@claim(
    id="infinite_sampling.steps",
    claim="The full framework takes far fewer decoding steps than micro groups.",
    source="evolution figure",
    bound=(
        "mean steps with predicted lengths at most 0.75 of micro groups', over at least 8 prompts,"
        " and below the order of arrival's without any prediction; live steps equal to the replay's"
    ),
    paper=f"-{_STEPS:.0%} (3250 to 1770)",
    needs="rows of infinite_sampling/schedule",
)
def steps(schedule: pd.DataFrame) -> Verdict:
    rollouts = schedule[schedule["kind"] == "rollout"]
    found = rollouts.pivot_table(index="prompt", columns="schedule", values="steps")
    micro, framework = found[labels.MICRO].mean(), found[labels.FRAMEWORK].mean()
    share, arrival = framework / micro, found[labels.FIFO].mean()
    replayed = rollouts[rollouts["replayed"].notna()]
    differ = int((replayed["steps"] != replayed["replayed"]).sum())
    measured = (
        f"{micro:.1f} to {framework:.1f} steps ({share - 1:+.0%}) over {len(found)} prompts, order"
        f" of arrival {arrival:.1f};"
        f" {len(replayed) - differ} of {len(replayed)} live rollouts take the"
        " steps of their replay"
    )
    if share >= 1 or differ:
        return Verdict("fails", measured)
    far = share <= 0.75 and framework < arrival
    return Verdict("holds" if far and len(found) >= 8 else "partly", measured)


@claim(
    id="infinite_sampling.near_oracle",
    claim=(
        "Scheduling with predicted lengths is nearly that with known ones, which is nearly optimal."
    ),
    source="scheduler ablation (near-oracle, in a reviewer's words)",
    bound=(
        "steps of the plan with known lengths at most 1.06 of the lower bound, and with predicted"
        " ones at most 1.1 of that plan's, means over prompts; and closer to that plan than the"
        " order of arrival is, which knows nothing, in the 95 % interval over at least 5 prompts"
    ),
    paper="near-oracle",
    needs="rows of infinite_sampling/schedule",
)
def near_oracle(schedule: pd.DataFrame) -> Verdict:
    rollouts = schedule[schedule["kind"] == "rollout"]
    found = rollouts.pivot_table(index="prompt", columns="schedule", values="steps")
    bound = rollouts.groupby("prompt")["lower_bound"].first()
    oracle, predicted = (
        (found[labels.ORACLE] / bound).mean(),
        (found[labels.FRAMEWORK] / found[labels.ORACLE]).mean(),
    )
    gained = mean_interval((found[labels.FIFO] - found[labels.FRAMEWORK]) / found[labels.ORACLE])
    measured = (
        f"known lengths {oracle:.3f} of the lower bound, predicted ones {predicted:.3f} of known"
        f" ones, over {len(found)} prompts; order of arrival {gained.value:.3f}"
        f" ({gained.low:.3f} to {gained.high:.3f}) further off"
    )
    if oracle <= 1.06 and predicted <= 1.1:
        return Verdict("holds" if gained.low > 0 and len(found) >= 5 else "partly", measured)
    return Verdict("partly" if oracle <= 1.06 or predicted <= 1.1 else "fails", measured)


@claim(
    id="infinite_sampling.throughput",
    claim="The full framework decodes over 25 % more tokens per second than micro groups.",
    source="abstract",
    bound=(
        "at least 1.25x micro groups' tokens per second, predictions, plans and re-ingestions in"
        " the time, all of the interval over at least 6 rounds"
    ),
    paper=f"over {_FASTER - 1:.0%}",
    needs="rows of infinite_sampling/schedule",
)
def throughput(schedule: pd.DataFrame) -> Verdict:
    found = speeds(schedule).set_index("schedule").loc[labels.FRAMEWORK]
    measured = (
        f"{found['speed_ratio']:.2f}x ({found['low_ratio']:.2f} to {found['high_ratio']:.2f}),"
        f" {schedule['model'].iloc[0]}"
    )
    rounds = schedule[schedule["kind"] == "time"]["repeat"].nunique()
    if found["low_ratio"] >= 1.25 and rounds >= 6:
        return Verdict("holds", measured)
    return Verdict("partly" if found["speed_ratio"] > 1 else "fails", measured)


@claim(
    id="infinite_sampling.pretrained",
    claim="So it does on a pretrained model.",
    source="abstract; on SmolLM2-135M, where the paper has larger models",
    bound=(
        "at least 1.25x micro groups' tokens per second for at least 5 prompts that are decoded"
        " live, and at most 1 / 1.25 of their steps in the mean over all; partly, with fewer"
        " prompts"
    ),
    needs="rows of infinite_sampling/pretrained",
)
def pretrained(pretrained: pd.DataFrame) -> Verdict:
    found = speeds(pretrained).set_index("schedule")
    rollouts = pretrained[
        (pretrained["kind"] == "rollout") & (pretrained["schedule"] == labels.MICRO)
    ]
    cut, live = int(rollouts["truncated"].sum()), int(rollouts["live"].sum())
    rounds = pretrained[pretrained["kind"] == "time"]["repeat"].nunique()
    ratio, steps = (
        found.loc[labels.FRAMEWORK, "speed_ratio"],
        found.loc[labels.FRAMEWORK, "micro_ratio"],
    )
    known, arrival = found.loc[labels.ORACLE, "micro_ratio"], found.loc[labels.FIFO, "micro_ratio"]
    measured = (
        f"{ratio:.2f}x, FIFO {found.loc[labels.FIFO, 'speed_ratio']:.2f}x with {live} prompts live"
        f" in {rounds} rounds; steps over {len(rollouts)} prompts {steps:.2f} of micro groups',"
        f" FIFO {arrival:.2f}, known lengths {known:.2f};"
        f" {cut} of {int(rollouts['group'].sum())} completions reach the limit;"
        f" {pretrained['model'].iloc[0]}"
    )
    if ratio >= 1.25 and steps <= 1 / 1.25 and live >= 5:
        return Verdict("holds", measured)
    return Verdict("partly" if ratio > 1 or steps < 1 else "fails", measured)


@claim(
    id="infinite_sampling.peers",
    claim="In the same number of rows it decodes faster than transformers does.",
    source="our addition: what one would use otherwise",
    bound=(
        "more tokens per second than `generate` in chunks and than `generate_batch`, in as many"
        " rows"
    ),
    needs="rows of infinite_sampling/schedule",
)
def peers(schedule: pd.DataFrame) -> Verdict:
    rows = schedule[schedule["kind"] == "time"]
    speed = rows.groupby("schedule")["tokens_per_second"].median()
    ratios = {
        name: speed[labels.FRAMEWORK] / speed[name]
        for name in (labels.GENERATE_CHUNKS, labels.GENERATE_BATCH)
        if name in speed
    }
    if not ratios:
        return Verdict("not tested here", "no rows of a peer")
    measured = ", ".join(f"{value:.2f}x {name}" for name, value in ratios.items())
    if labels.GENERATE_FULL in speed:
        measured += (
            f"; {speed[labels.FRAMEWORK] / speed[labels.GENERATE_FULL]:.2f}x generate of the full"
            " group, in four times the memory"
        )
    return Verdict(
        "holds" if min(ratios.values()) > 1 else "partly" if max(ratios.values()) > 1 else "fails",
        measured,
    )


@claim(
    id="infinite_sampling.exact",
    claim="Completions are what they would be without it, in full length.",
    source="abstract (full-length completions)",
    bound=(
        "every schedule gives the full group's completions, token for token, in float64 and in"
        " float32 with fixed shapes, and a forward without a cache draws them again; another seed"
        " gives less than half of them"
    ),
    paper="no truncation",
    needs="rows of infinite_sampling/exactness",
)
def exact(exactness: pd.DataFrame) -> Verdict:
    rows = exactness[exactness["kind"] == "completions"].copy()
    other = rows[rows["schedule"] == labels.OTHER_SEED]
    chance = other["same"].sum() / other["completions"].sum() if len(other) else 1.0
    rows = rows[rows["schedule"] != labels.OTHER_SEED]
    rows["fixed_shape"] = rows["fixed_shape"].astype(bool)
    hard = rows[(rows["dtype"] == "float64") | rows["fixed_shape"]]
    drawn = rows[(rows["dtype"] == "float64") & ~rows["fixed_shape"]]
    soft = rows[(rows["dtype"] == "float32") & ~rows["fixed_shape"]]
    same, total = int(hard["same"].sum()), int(hard["completions"].sum())
    redrawn = int(drawn["redrawn"].sum())
    measured = (
        f"{same} of {total} identical over {len(hard)} schedules and formats, {redrawn} of"
        f" {int(drawn['completions'].sum())} drawn again; in plain float32"
        f" {int(soft['same'].sum())} of {int(soft['completions'].sum())}; with another seed"
        f" {chance:.0%} are"
    )
    if drawn.empty or not hard["fixed_shape"].any():
        return Verdict("not tested here", "no rows in float64, or none with fixed shapes")
    if same < total or redrawn < drawn["completions"].sum():
        return Verdict("fails", measured)
    return Verdict("holds" if chance < 0.5 else "partly", measured)


@claim(
    id="infinite_sampling.gradient",
    claim="The gradient of micro batches is that of the whole group.",
    source="our addition: what equal training rests on",
    bound=(
        "relative difference at most 1e-12 in float64, for each way to average tokens, where"
        " advantages within micro batches make one of at least 1e-2"
    ),
    needs="rows of infinite_sampling/exactness",
)
def gradient(exactness: pd.DataFrame) -> Verdict:
    rows = exactness[(exactness["kind"] == "gradient") & (exactness["dtype"] == "float64")]
    worst = rows["relative_difference_ratio"].max()
    single = exactness[(exactness["kind"] == "gradient") & (exactness["dtype"] == "float32")][
        "relative_difference_ratio"
    ].max()
    averages = rows["loss_type"].nunique()
    own = exactness[exactness["kind"] == "own advantages"]["relative_difference_ratio"].min()
    measured = (
        f"{worst:.1e} over {averages} ways to average tokens"
        + (f", {single:.1e} in float32" if single == single else "")
        + f"; with advantages of the micro batch alone {own:.1e}"
    )
    if worst != worst or worst > 1e-12:
        return Verdict("fails", measured)
    return Verdict("holds" if averages == 3 and own >= 1e-2 else "partly", measured)


@claim(
    id="infinite_sampling.theorems",
    claim=(
        "Continuous sampling never takes more steps than micro groups, and plans are within (1 +"
        " eps) of the optimum."
    ),
    source="reconstructed: the guarantee of an FPTAS",
    bound=(
        "no violation on 20,000 random instances, nor of plans against the best of all assignments"
    ),
    needs="rows of infinite_sampling/theorems",
)
def theorems(theorems: pd.DataFrame) -> Verdict:
    rows = theorems[theorems["violations"].notna()]
    violations, instances = int(rows["violations"].sum()), int(rows["instances"].max())
    measured = (
        f"{violations} violations of {len(rows)} statements, on up to {instances:,} instances"
    )
    return Verdict(
        "fails" if violations else "holds" if instances >= 20_000 else "partly", measured
    )


@claim(
    id="infinite_sampling.plan_time",
    claim="Planning costs next to nothing.",
    source="reconstructed: an FPTAS is run for every rollout",
    bound="the plan takes at most 1 % of its rollout's time, in the mean over prompts",
    needs="rows of infinite_sampling/schedule",
)
def plan_time(schedule: pd.DataFrame) -> Verdict:
    rows = schedule[(schedule["kind"] == "rollout") & (schedule["schedule"] == labels.FRAMEWORK)]
    share = (rows["plan_seconds"] / rows["rollout_seconds"]).mean()
    predicting = (rows["predict_seconds"] / rows["rollout_seconds"]).mean()
    measured = (
        f"plan {share:.2%} of the rollout, predictions {predicting:.1%},"
        f" {schedule['model'].iloc[0]}"
    )
    return Verdict("holds" if share <= 0.01 else "partly" if share <= 0.05 else "fails", measured)


@claim(
    id="infinite_sampling.prediction",
    claim=(
        "Lengths can be predicted from the first tokens of a completion; from the prompt alone they"
        " cannot be told apart within a group."
    ),
    source="figure 7; the predictor is conditioned on the first k tokens",
    bound=(
        "Kendall's tau within groups is 0 with k = 0 and above 0.5 for some k of 1 to 4, where the"
        " error of the total is below that of the mean length, which predicts nothing"
    ),
    needs="rows of infinite_sampling/prediction",
)
def prediction(prediction: pd.DataFrame) -> Verdict:
    rows = prediction[prediction["predictor"] == "transformer"].set_index("prefix")
    nothing = prediction[prediction["predictor"] == "constant"].set_index("prefix")
    none, few = rows.loc[0], rows[(rows.index >= 1) & (rows.index <= 4)]
    best = few["group_tau_ratio"].idxmax()
    measured = (
        f"tau within groups {none['group_tau_ratio']:.2f} with k = 0 (pooled"
        f" {none['pooled_tau_ratio']:.2f}), {few['group_tau_ratio'].max():.2f} with k = {best};"
        f" error of the total {none['total_error_tokens']:.1f} to"
        f" {few.loc[best, 'total_error_tokens']:.1f} tokens, of the mean length"
        f" {nothing.loc[best, 'total_error_tokens']:.1f}"
    )
    better = few.loc[best, "total_error_tokens"] < nothing.loc[best, "total_error_tokens"]
    if few["group_tau_ratio"].max() <= 0.5 or not better:
        return Verdict("fails", measured)
    return Verdict("holds" if abs(none["group_tau_ratio"]) < 1e-9 else "partly", measured)


@claim(
    id="infinite_sampling.shortest_first",
    claim="Refilling slots shortest first is the right run-time rule.",
    source="method (SJF refill)",
    bound=(
        "with predicted lengths, no other rule takes fewer steps: not the order of arrival nor"
        " longest first, nor longest first within a plan; fails where one does in the 95 % interval"
        " over at least 5 prompts, partly where an interval does not tell"
    ),
    needs="rows of infinite_sampling/ablation",
)
def shortest_first(ablation: pd.DataFrame) -> Verdict:
    steps = ablation[ablation["kind"] == "steps"]
    steps = steps[steps["lengths"].str.startswith("k = ") & (steps["lengths"] != "k = 0")]
    share = (steps["steps"] / steps["lower_bound"]).groupby([steps["prompt"], steps["refill"]])
    found = share.mean().unstack()
    beyond, told = [], []
    for shortest, other, name in (
        ("sjf_global", "fifo", "arrival"),
        ("sjf_global", "lpt_global", "longest first"),
        ("plan_sjf", "plan_lpt", "longest first within a plan"),
    ):
        more = mean_interval(found[shortest] - found[other])
        beyond.append(more)
        told.append(f"{name} {more.value:+.3f} ({more.low:+.3f} to {more.high:+.3f})")
    measured = (
        f"steps beyond those of other rules, in lower bounds, over {len(found)} prompts, mean over"
        f" k: {'; '.join(told)}"
    )
    if len(found) >= 5 and any(more.low > 0 for more in beyond):
        return Verdict("fails", measured)
    return Verdict("holds" if all(more.high <= 0 for more in beyond) else "partly", measured)


@claim(
    id="infinite_sampling.training",
    claim="GRPO trains with it as with the whole group.",
    source="title (stable training); the paper shows no reward curve, as reviewers noted",
    bound=(
        "in float64 every step has the full group's rewards with micro groups and with the"
        " framework, and the reward on the training pool rises; TRL's own completions do not have"
        " them"
    ),
    needs="rows of infinite_sampling/training",
)
def training(training: pd.DataFrame) -> Verdict:
    own = training[training["kind"] == "step"]
    steps = own[~own["mode"].str.startswith(labels.TRL)]
    single, steps = steps[steps["dtype"] == "float32"], steps[steps["dtype"] == "float64"]
    others, single = steps[steps["mode"] != labels.FULL], single[single["mode"] != labels.FULL]
    same = int(others["same_rewards"].astype(bool).sum())
    ends = training[
        (training["kind"] == "evaluation")
        & (training["dtype"] == "float64")
        & (training["mode"] == labels.FULL)
    ]
    pool = ends[ends["prompts"] == "pool"].sort_values("step")["reward_score"]
    held = ends[ends["prompts"] == "held out"].sort_values("step")["reward_score"]
    measured = (
        f"{same} of {len(others)} steps with equal rewards; reward on the pool {pool.iloc[0]:.2f}"
        f" to {pool.iloc[-1]:.2f}, held out "
    )
    measured += f"{held.iloc[0]:.2f} to {held.iloc[-1]:.2f}"
    if len(single):
        measured += (
            f"; in float32 {int(single['same_rewards'].astype(bool).sum())} of {len(single)} steps"
        )
    chance = own[own["mode"] == labels.TRL]["same_rewards"].astype(bool)
    if len(chance):
        measured += f", with completions of TRL's own {int(chance.sum())} of {len(chance)}"
    if same < len(others) or not len(others):
        return Verdict("fails", measured)
    told_apart = not len(chance) or not chance.all()
    return Verdict("holds" if told_apart and pool.iloc[-1] > pool.iloc[0] else "partly", measured)


@claim(
    id="infinite_sampling.drift",
    claim="A predictor that is fitted online keeps up with the policy.",
    source="our addition: reviewers asked what happens as the policy changes",
    bound=(
        "in the second half of training its mean error is below that of a predictor fitted at the"
        " first step alone, in each of at least 5 seeds; partly, with fewer seeds"
    ),
    needs="rows of infinite_sampling/training",
)
def drift(training: pd.DataFrame) -> Verdict:
    rows = training[
        (training["kind"] == "step")
        & (training["mode"] == labels.TRAINED_FRAMEWORK)
        & training["frozen_error_tokens"].notna()
    ]
    late = rows[rows["step"] >= rows["step"].max() / 2]
    online, frozen = late["online_error_tokens"].mean(), late["frozen_error_tokens"].mean()
    lengths = rows.sort_values("step")["length_tokens"]
    seeds = rows["seed"].nunique() if "seed" in rows else 1
    measured = (
        f"error {online:.2f} tokens online, {frozen:.2f} fitted once; mean length"
        f" {lengths.iloc[0]:.1f} to {lengths.iloc[-1]:.1f} tokens; seeds: {seeds}"
    )
    if online >= frozen:
        return Verdict("fails", measured)
    return Verdict("holds" if seeds >= 5 else "partly", measured)


@claim(
    id="infinite_sampling.trl_rollout",
    claim=(
        "TRL's trainer takes it for its rollout: it trains the same, and the group is no longer in"
        " memory."
    ),
    source="our addition: what one would train with otherwise",
    bound=(
        "with this rollout TRL's trainer has the rewards of this library's own steps at every step,"
        " and the peak of its rollout is at most half of that of TRL's own"
    ),
    needs="rows of infinite_sampling/training",
)
def trl_rollout(training: pd.DataFrame) -> Verdict:
    found = trained(training[training["dtype"] == "float32"])
    if not {labels.TRL, labels.TRL_OURS} <= set(found.get("mode", ())):
        return Verdict("not tested here", "no rows of TRL's trainer in float32")
    rows = found.set_index("mode")
    ours, own = rows.loc[labels.TRL_OURS], rows.loc[labels.TRL]
    if pd.isna(ours["rollout_peak_bytes"]):
        return Verdict("not tested here", "no peaks of rollouts")
    share = ours["rollout_peak_bytes"] / own["rollout_peak_bytes"]
    peaks = [human_bytes(row["rollout_peak_bytes"]) for row in (ours, own)]
    measured = (
        f"{ours['same_rewards']} steps with the rewards of the library's own; peak of the rollout"
        f" {peaks[0]} against {peaks[1]} ({share:.0%}); reward on the pool {ours['pool']}, with"
        f" TRL's own rollout {own['pool']}"
    )
    same, small = ours["same"] == ours["made"], share <= 0.5
    return Verdict("holds" if same and small else "partly" if same or small else "fails", measured)


@claim(
    id="infinite_sampling.trl_time",
    claim="A training step takes no longer than one of TRL's trainer, in a fraction of its rows.",
    source="our addition: the paper shows no training times, as reviewers noted",
    bound=(
        "the framework's step takes at most the time of TRL's, which decodes all completions of a"
        " step at once; partly, where the full group's does, in as many rows"
    ),
    needs="rows of infinite_sampling/training",
)
def trl_time(training: pd.DataFrame) -> Verdict:
    found = trained(training[training["dtype"] == "float32"])
    if not {labels.TRL, labels.TRAINED_FRAMEWORK, labels.FULL} <= set(found.get("mode", ())):
        return Verdict("not tested here", "no rows of TRL's trainer in float32")
    ratios = found.set_index("mode")["trl_ratio"]
    framework, full = ratios[labels.TRAINED_FRAMEWORK], ratios[labels.FULL]
    measured = (
        f"{framework:.2f} of TRL's time for the framework; {full:.2f} for the full group at once;"
        " medians over steps in turns"
    )
    return Verdict("holds" if framework <= 1 else "partly" if full <= 1 else "fails", measured)
